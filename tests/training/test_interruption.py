"""Signals while training, in a process of their own."""

import signal
import subprocess
import sys
import threading

import pytest

from kdiffusion.training.loop.interruption import Interruption

_BUSY = """
import sys, time
from kdiffusion.training.loop.interruption import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    {work}
    print("signal", interruption.signal, flush=True)
"""


def start(work):
    process = subprocess.Popen(
        [sys.executable, "-c", _BUSY.format(work=work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
    process = start("while not interruption.signal: time.sleep(0.01)")
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert output == f"signal {int(number)}\n" and process.returncode == 0
    assert errors == f"\n{number.name}: stopping after this step; once more to stop at once.\n"


@pytest.mark.parametrize("second, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_the_process_within_a_step(second, code):
    # One call into C without Python's lock: handlers of Python would wait for its end.
    process = start("import select; select.select([], [], [], 600)")
    process.send_signal(signal.SIGINT)
    assert "once more" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(second)
    process.communicate(timeout=300)
    assert process.returncode == code


def test_handlers_are_put_back_and_other_threads_have_none():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert interruption.signal is None
    seen = []

    def work():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before[0]]
