"""Interleaved timing of rivals: A B A B in one process, ratios of per-round times.

Machines drift and neighbours disturb, so the ratios are what to quote.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def compare(title: str, rivals: dict[str, Callable[[], object]], rounds: int = 7) -> None:
    """Print the median ms of each rival and its median ratio to the first one."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()  # warm-up
    for _ in range(rounds):
        for name, run in rivals.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    first = next(iter(rivals))
    print(title)
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[first], seconds, strict=True))
        print(f"  {name:<42} {statistics.median(seconds) * 1e3:9.1f} ms   x{ratio:.2f}")
