"""The process of a peer, as its parent sees it."""

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
    """A peer failed; the message is the reason."""


class Stopped(Exception):
    """A peer was stopped at the limit; `value` is what it had taken by then."""

    def __init__(self, value):
        super().__init__(f"stopped at {value}")
        self.value = value


class Process:
    """The process of a peer, which starts at once and waits for requests.

    Args:
        peer: name of the peer.
        folder: see `measuring.Plan`.
        dtype: str.
        variables: environment variables beside the peer's own.
        limit: seconds of a run after which the process is killed, or `None`.
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
            Failed: If the peer fails, with its reason, or the last line that it wrote.
            Stopped: If a run exceeds the limit.
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
        """Choose the method that is run, and run it once; its seconds include compilation."""
        self.ask("choose", method, arguments)
        return self.ask("run")

    def memory(self):
        """Return its highest resident memory so far, in bytes."""
        if self.memory_when_stopped is not None:
            return self.memory_when_stopped
        # The peak of `getrusage` includes that of the parent before the fork.
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()
