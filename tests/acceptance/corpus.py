"""Hostile, broken and odd checkpoint files: `python tests/acceptance/corpus.py`.

Builds every file of tests/corpus, opens each in a process of its own under an audit hook, and
compares what comes of it with what must: the error's class and words, or the arrays, bit for bit.
No file may execute, import, write or open anything else, take longer than its limit (5 s), or more
than 256 MB. Exits with 1 if one does, or if there are too few files.
"""

import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
from corpus import model_cases, safetensors_cases, torch_cases  # noqa: E402
from corpus.case import Case  # noqa: E402

CASES = safetensors_cases.CASES + torch_cases.CASES + model_cases.CASES
FEWEST_FILES, FEWEST_VALID = 90, 20
NUMBERS = {*range(1, 68), 74, 75, 76, 80}
MOST_EXTRA_BYTES = 256_000_000
NOBODY = 65534
BUSY = 4  # processes that may share a processor with this command
HARMLESS = (
    "array.",
    "builtins.id",
    "gc.",
    "marshal.",
    "object.",
    "os.listdir",
    "os.scandir",
    "sys._getframe",
)
READING = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_BINARY", 0)
OWN_CHANGES = ("truncated while it is read", "replaced while it is read")


def write_beside(path):
    path.with_name("executed").write_text("")
    return {}


def allocate(path):
    return {"x": np.ones(300_000_000, np.uint8)}


SPIES = [  # what the command itself must notice
    Case(0, "calls a program", b"", use=lambda path: os.system("true") and {}),
    Case(0, "imports", b"", use=lambda path: __import__("this_is_no_module")),
    Case(0, "writes a file", b"", use=write_beside),
    Case(0, "opens another file", b"", use=lambda path: Path(__file__).read_bytes() and {}),
    Case(0, "allocates 300 MB", b"", use=allocate),
    Case(0, "takes long", b"", use=lambda path: time.sleep(0.5) or {}, seconds=0.1),
]


def main():
    began = time.perf_counter()
    work = Path(tempfile.mkdtemp())
    work.chmod(0o755)
    failures, slowest, largest = [], 0.0, 0
    try:
        for number, spy in enumerate(SPIES):
            if not run(spy, work / f"spy{number}")[0]:
                failures.append(f"this command does not notice what {spy.name}")
        for place, case in enumerate(CASES):
            problems, seconds, extra = run(case, work / f"{place:03d}")
            slowest, largest = max(slowest, seconds), max(largest, extra)
            failures += [f"{case.number} {case.name}: {problem}" for problem in problems]
    finally:
        shutil.rmtree(work)
    missing = NUMBERS - {case.number for case in CASES}
    failures += [f"no file for threat {number}" for number in sorted(missing)]
    valid = sum(case.error is None for case in CASES)
    for failure in failures:
        print(f"FAILED {failure}")
    print(
        f"{len(CASES)} files, {valid} of them sound, in {time.perf_counter() - began:.0f} s; "
        f"slowest {slowest:.2f} s, most memory {largest / 1e6:.0f} MB; {len(failures)} failures"
    )
    return 1 if failures or len(CASES) < FEWEST_FILES or valid < FEWEST_VALID else 0


def run(case, folder):
    """Makes a case's files and opens them in a child; tells problems, seconds and bytes."""
    folder.mkdir()
    path = case.make(folder)
    before = listing(folder)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, pickle.dumps(watched(case, path, folder)))
        os._exit(0)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(60)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    signal.alarm(0)
    os.waitpid(child, 0)
    if not answer:
        return ["the process died or was stopped after 60 s"], 60.0, 0
    problems, seconds, extra = pickle.loads(answer)
    if case.name not in OWN_CHANGES and listing(folder) != before:
        problems.append("files were changed")
    if seconds > case.seconds:
        problems.append(f"took {seconds:.1f} s")
    if extra > MOST_EXTRA_BYTES:
        problems.append(f"took {extra / 1e6:.0f} MB")
    return problems, seconds, extra


def listing(folder):
    return sorted(
        (os.fsencode(path), path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    )


def watched(case, path, folder):
    """Opens a case's file under the audit hook."""
    if case.name == "no permission" and os.geteuid() == 0:
        os.seteuid(NOBODY)
    os.chdir("/")
    seen = []
    if case.name not in OWN_CHANGES:
        sys.addaudithook(lambda event, arguments: watch(event, arguments, folder, seen))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    found, error = None, None
    try:
        found = case.use(path)
    except Exception as raised:  # anything at all is to be judged here
        error = raised
    # On a busy machine a file has not had all of the time that passed.
    seconds = max(time.process_time() - worked, (time.perf_counter() - began) / BUSY)
    extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return [*judged(case, path, found, error), *sorted(set(seen))], seconds, extra


def watch(event, arguments, folder, seen):
    if event == "open":
        name, _, flags = arguments
        inside = isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(str(folder))
        if not inside and not isinstance(name, int):
            seen.append(f"opened {name!r}")
        if flags & ~READING:
            seen.append(f"opened {name!r} to write")
    elif not event.startswith(HARMLESS):
        seen.append(f"audit event {event} {str(arguments)[:100]}")


def judged(case, path, found, error):
    if error is not None and (case.error is None or not isinstance(error, case.error)):
        return [f"{type(error).__name__}: {str(error)[:300]}"]
    if error is None and case.error is not None:
        return [f"loaded, instead of {case.error.__name__}"]
    if error is not None:
        return judged_message(case, path, str(error))
    if case.expected is None:
        return []
    if found.keys() != case.expected.keys():
        return [f"names differ: {sorted(found.keys() ^ case.expected.keys())[:5]}"]
    return [
        f"{name[:50]!r} differs"
        for name, array in case.expected.items()
        if found[name].dtype != array.dtype
        or found[name].shape != array.shape
        or found[name].tobytes() != np.ascontiguousarray(array).tobytes()
    ]


def judged_message(case, path, message):
    problems = []
    if case.message not in message:
        problems.append(f"the message lacks {case.message!r}: {message[:300]}")
    if not any(part in message for part in (str(path), path.name, repr(str(path)))):
        problems.append(f"the message names no file: {message[:300]}")
    if len(message) > 3000 or not message.isprintable():
        problems.append(f"the message is not fit for a terminal: {message[:300]!r}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
