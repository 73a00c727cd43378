"""A peer's process, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks.peers import PEERS


class Failed(Exception):
    """Why a peer did not do what it was told."""


class Process:
    """A peer's process; it starts at once and waits, without using the processor, for its turn."""

    def __init__(
        self,
        peer: str,
        folder: Path,
        dtype: str,
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        self.peer = peer
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", peer, str(folder), dtype],
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
        """
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
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

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()
