"""Prompts and pictures as people give them: each has its documented result, or its error.

    python tests/acceptance/inputs.py

Prints one row for each case: what was expected, what came, the verdict. A result has to be that of
the same prompt or picture in its plain form, twice the same, and unlike that of a mistake; an
error a `ValueError` that says what is wrong, within a second and 256 MiB. `KDIFFUSION_CLIP_VOCAB`
adds the long prompts in CLIP's own vocabulary. Needs Linux and pytest.
"""

import argparse
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from inputs_pictures import picture_cases
from inputs_prompts import prompt_cases

from kdiffusion import StableDiffusion

ERROR_SECONDS, ERROR_MEMORY = 1.0, 256 << 20


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    # Keras's warning of an axis of size 1: the attention of a picture of 8 x 8 pixels.
    warnings.filterwarnings("ignore", message="You are using a softmax over axis")
    model = StableDiffusion.from_preset("random-tiny", jit_compile=False)
    count, failures = 0, []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(row("case", "expected", "got", "verdict"))
        for case in (*prompt_cases(model), *picture_cases(model)):
            got, problem = check(case)
            verdict = f"FAILED: {problem}" if problem else "ok"
            print(row(case.name, case.expected, got, verdict), flush=True)
            count += 1
            failures += [case.name] * bool(problem)
        os.chdir("/")
    for name in failures:
        print("FAILED:", name)
    print(f"{count} cases: {count - len(failures)} as documented, {len(failures)} failed")
    sys.exit(bool(failures))


def row(name, expected, got, verdict):
    return f"{name:44.44s} {expected:50.50s} {got:100.100s} {verdict}"


def check(case):
    """Return the outcome of a case, and what is wrong with it, if anything."""
    memory = reset_peak_memory()
    start = time.monotonic(), time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=UserWarning, append=True)
        try:
            result, error = case.draw(), None
        except Exception as exception:
            result, error = None, exception
    # Other work on the machine is not counted, and neither is a second core.
    seconds = min(time.monotonic() - start[0], time.process_time() - start[1])
    if error is not None or case.error:
        return check_error(case, error, result, seconds, peak_memory() - memory)
    shown = [str(warning.message) for warning in caught]
    got = f"{'x'.join(map(str, result.shape))} in {seconds:.2f} s"
    if shown:
        got += f", warned: {shown[0]}"
    if seconds > case.seconds:
        return got, f"more than {case.seconds:g} s"
    if len(shown) != bool(case.warning) or not all(re.search(case.warning, w) for w in shown):
        return got, f"must warn of {case.warning!r}, did of {shown}"
    return got, check_result(case, result)


def check_error(case, error, result, seconds, memory):
    if error is None:
        return f"{'x'.join(map(str, result.shape))} in {seconds:.2f} s", "no error"
    got = ascii(f"{type(error).__name__}: {error}")[1:-1]
    if not case.error:
        return got, "an error"
    if not isinstance(error, ValueError) or not re.search(case.error, str(error)):
        return got, f"must be a ValueError of {case.error!r}"
    if seconds > ERROR_SECONDS or memory > ERROR_MEMORY:
        return got, f"refused after {seconds:.1f} s and {memory >> 20} MiB"
    return got, ""


def check_result(case, result):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = case.draw()
        like = result if case.like is None else case.like()
        unlike = None if case.unlike is None else case.unlike()
    if not np.isfinite(result).all():
        return "not finite"
    if not np.array_equal(result, again):
        return "another result the second time"
    if case.near:
        share = np.abs(result - 1.0 * like).mean() / np.abs(result - 1.0 * unlike).mean()
        return f"{share:.0%} of the way to a mistake" if share > 0.25 else ""
    if difference(result, like) > case.bar:
        return f"{difference(result, like):g} from what was expected, bar {case.bar:g}"
    if unlike is not None and difference(result, unlike) <= 4 * case.bar:
        return "the result of a mistake"
    return ""


def difference(first, second):
    if first.shape != second.shape:
        return np.inf
    return np.abs(first.astype(np.float64) - second.astype(np.float64)).max()


def reset_peak_memory():
    """Bytes in use now, from which on `peak_memory` counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) << 10


if __name__ == "__main__":
    main()
