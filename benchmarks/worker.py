"""The process of a peer, which answers requests.

Requests and answers are JSON, one a line. `["load"]` and `["run"]` return seconds.
`["choose", method, arguments]` selects the method that is run, and returns nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.peers import FRAMEWORKS, PEERS, Unavailable


def main():
    name, folder, dtype = sys.argv[1:]
    # Frameworks print to the standard output, which must hold nothing but answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        try:
            worker = worker or Worker(name, Path(folder), dtype)
            command, *arguments = json.loads(line)
            answer = {"answer": getattr(worker, command)(*arguments)}
        except Unavailable as reason:
            answer = {"error": str(reason)}
        except Exception as error:
            reason = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {reason[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A peer, and the function that is measured."""

    def __init__(self, name, folder, dtype):
        row = PEERS[name]
        # Python marks modules that cannot be imported with None.
        sys.modules.update({x: None for x in FRAMEWORKS if x not in row.frameworks})
        module = importlib.import_module(f"benchmarks.peers.{row.module}")
        self.peer = module.Peer(folder, dtype)
        self.function = None

    def load(self):
        return _seconds(self.peer.load)

    def choose(self, method, arguments):
        if not hasattr(self.peer, method):
            raise Unavailable(f"it offers nothing to measure as {method!r}")
        self.function = getattr(self.peer, method)(*arguments)

    def run(self):
        return _seconds(self.function)


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
