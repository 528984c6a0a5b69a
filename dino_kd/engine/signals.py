"""Turn SIGTERM, SIGINT and SIGUSR2 into a flag that the loop reads at its next step boundary."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopFlag:
    """Why the run should end after the current step; empty while it should not.

    Handlers only set the flag: saving inside a handler could meet a half-done optimiser step or
    collective. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.reason = ""

    def request(self, reason: str) -> None:
        """Ask for the end of the run; the first reason is kept."""
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the signals inside this block; the old handlers come back after it."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python allows handlers in the main thread only
            return
        names = ("SIGTERM", "SIGINT", "SIGUSR2")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if not self.reason:
            # os.write: print may be interrupted in the middle of itself
            message = f"\n{name}: stopping after this step and saving; "
            os.write(2, f"{message}a second Ctrl-C quits at once without saving\n".encode())
        self.request(f"received {name}")
