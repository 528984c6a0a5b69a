"""Pillow's warnings about damaged pictures, ignored in any number of threads at once.

`warnings.catch_warnings` saves and restores the filters of the whole process. Threads whose blocks
overlap would restore each other's, and leave every warning of the process ignored for good.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator


class _Quiet:
    """The first thread to enter changes the filters, the last to leave restores them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = warnings.catch_warnings()

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = warnings.catch_warnings()
                self.before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")  # others are still heard
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.before.__exit__(None, None, None)


_quiet = _Quiet()


def _renew() -> None:
    """In a forked child no other thread is left to open a lock that it held."""
    global _quiet
    _quiet = _Quiet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Inside this block, warnings that Pillow's modules give are not shown."""
    quiet = _quiet
    quiet.enter()
    try:
        yield
    finally:
        quiet.leave()
