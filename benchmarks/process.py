"""A peer's process, seen from outside."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks.peers import PEERS


class Failed(Exception):
    """Why a peer did not do what it was told."""


class Stopped(Exception):
    """A peer took longer than it may; `value` is what it had taken by then."""

    def __init__(self, value):
        super().__init__(f"stopped at {value}")
        self.value = value


class Process:
    """A peer's process; it starts at once and waits, without using the processor, for its turn.

    A run that takes longer than `limit` seconds ends it.
    """

    def __init__(
        self,
        peer: str,
        folder: Path,
        dtype: str,
        variables: Mapping[str, str] = MappingProxyType({}),
        limit: float | None = None,
    ):
        self.peer = peer
        self.limit = limit
        self.memory_when_stopped = None
        self.log = tempfile.TemporaryFile("w+")
        elsewhere = os.environ[PEERS[peer].checkout] if PEERS[peer].checkout else None
        self.process = subprocess.Popen(
            # Another checkout's worker knows its own kdiffusion.
            [sys.executable, "-m", "benchmarks.worker", "kdiffusion" if elsewhere else peer]
            + [str(folder.absolute()), dtype],
            cwd=elsewhere,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **PEERS[peer].environment, **variables},
        )

    def ask(self, *request):
        """Send a request and wait for its answer.

        Raises:
            Failed: With the peer's reason, or the last line that it wrote before it died.
            Stopped: With the limit.
        """
        if self.memory_when_stopped is not None:
            raise Failed(f"it was stopped after {self.limit:g} s of a run before")
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            limit = self.limit if request == ("run",) else None
            if not select.select([self.process.stdout], [], [], limit)[0]:
                self.memory_when_stopped = self.memory()
                self.process.kill()
                raise Stopped(self.limit)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no word"])[-1]
            raise Failed(f"ended with exit code {self.process.wait()}: {last[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["answer"]

    def first_run(self, method, arguments):
        """Choose what is run, and run it once; the seconds include its compilation."""
        self.ask("choose", method, arguments)
        return self.ask("run")

    def memory(self):
        """Its highest resident memory so far, in bytes."""
        if self.memory_when_stopped is not None:
            return self.memory_when_stopped
        # Not `getrusage`, whose peak includes that of the process this one was forked from.
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()
