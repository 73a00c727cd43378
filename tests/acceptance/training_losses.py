"""The losses of all trainers against diffusers, transformers and PyTorch, with their figures.

    python tests/acceptance/training_losses.py

Runs the parity of training and prints each figure that it measured.
"""

import sys
from pathlib import Path

import pytest

PARITY = Path(__file__).resolve().parents[1] / "parity"


class Figures:
    """Prints what each test has recorded or printed."""

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        for name, figure in report.user_properties:
            print(f"\n{name}: {figure}", end="")
        if report.passed and report.capstdout:
            print(f"\n{report.capstdout}", end="")


def main():
    files = sorted(map(str, PARITY.glob("test_training_*.py")))
    if not files:
        sys.exit(f"No parity of training in {PARITY}")
    sys.exit(pytest.main(["-q", *files], plugins=[Figures()]))


if __name__ == "__main__":
    main()
