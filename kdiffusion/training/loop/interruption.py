"""Ctrl-C and SIGTERM: the first stops the run after its step, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading


class Interruption:
    """A scope in which signals are noted and raise nothing.

    Python runs signal handlers between two of its instructions, and a step of training is a single
    instruction. So a thread reads the signals from a pipe as soon as they come.

    Attributes:
        signal: int, the first signal, or `None` before it.

    Example:

    >>> with Interruption() as interruption:
    ...     while not interruption.signal:
    ...         step()
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interruption:
        # Python gives signals to the main thread alone.
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._handlers = {number: signal.signal(number, _ignore) for number in self._SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._write)  # this ends the thread
            self._thread.join()
            os.close(self._read)

    def _listen(self):
        while number := int.from_bytes(os.read(self._read, 1), "little"):
            if number not in self._SIGNALS:
                continue
            if self.signal is not None:
                os._exit(128 + number)
            self.signal = number
            name = signal.Signals(number).name
            print(
                f"\n{name}: stopping after this step; once more to stop at once.",
                file=sys.stderr,
                flush=True,
            )


def _ignore(number, frame):
    """Do nothing; without a handler the signal would end the process."""
