"""The tests of small networks see each mistake that `exactness.py` sees in full-size ones.

    python tests/acceptance/exactness_golden.py

The networks, inputs and bar are those of `weights/test_golden.py`, so it is enough that CI runs
these, and `exactness.py` where a change touches it. A wrong pad id is no mistake of a network; it
is what `parity/test_tokenizer.py` sees.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "weights")]

from exactness_mutants import mutants  # noqa: E402
from test_golden import BAR, CASES, build_case, largest_error  # noqa: E402

NAMES = {"image_decoder": "decoder"}  # of a pipeline's parts, where they are no kinds
NOT_OF_NETWORKS = {"pad id 49407 <-> 0"}


def main():
    failed = count = 0
    for case in CASES:
        kind = case.split()[0]
        model = build_case(case)
        parts = SimpleNamespace(**{NAMES.get(kind, kind): model})
        choices = mutants(parts, kind)
        for name in ["as it is", *sorted(choices.keys() - NOT_OF_NETWORKS)]:
            with choices.get(name, nullcontext)(parts):
                error = largest_error(case, model)
            seen = error > BAR
            right = seen != (name == "as it is")
            print(f"{case:32s} {name:40s} {error:.1e} {'ok' if right else 'FAILED'}", flush=True)
            failed += not right
            count += 1
    print(f"{count - failed} passed, {failed} failed; bar {BAR:.0e}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
