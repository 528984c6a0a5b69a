"""Does the student follow its teacher? Numbers of the log, and the sentences they justify."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_CONFLICTS_IN_A_ROW = 3


class FidelityMonitor:
    """A hook that reads each row of metrics and warns once, in words, about each known trouble.

    Nothing is said in the first tenth of the run (at least 100 steps).
    """

    def __init__(self, warn: Callable[[str], None], *, total_steps: int) -> None:
        self.warn = warn
        self.quiet_until = max(100, total_steps // 10)
        self.said: set[str] = set()

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        return {}
