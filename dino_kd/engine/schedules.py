"""Schedules as pure functions of the 0-based step; nothing is stored, so resume needs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine(start: float, end: float, total_steps: int) -> Schedule:
    """``end + (start - end) / 2 * (1 + cos(pi * t))``, t from 0 (first step) to 1 (last step)."""

    def value(step: int) -> float:
        progress = min(step / max(total_steps - 1, 1), 1.0)
        return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))

    return value


def constant(level: float) -> Schedule:
    """The same value at every step."""
    return lambda step: level


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line that reaches `end` at step `steps` and stays there."""

    def value(step: int) -> float:
        return end if step >= steps else start + (end - start) * step / steps

    return value


def after_warmup(main: Callable[[int], Schedule], peak: float, warmup: int, total: int) -> Schedule:
    """A linear rise over `warmup` steps to `peak`, then ``main(remaining steps)`` from its step 0.

    Step i of the rise has ``peak * (i + 1) / (warmup + 1)``: the first step already learns, and
    the peak is met once, at step `warmup`.
    """
    rest = main(total - warmup)
    return lambda step: peak * (step + 1) / (warmup + 1) if step < warmup else rest(step - warmup)


def switch(until: int) -> Schedule:
    """1.0 before step `until`, 0.0 from then on."""
    return lambda step: 1.0 if step < until else 0.0


def ramped(level: float, rise: float, fade: float, total: int) -> Schedule:
    """`level`, rising linearly from 0 over the first `rise` and falling to 0 over the last `fade`.

    Both are shares (0..1) of a run of `total` steps. The first step has a share of the level above
    0; the one after the last would have none.
    """
    up, down = max(1.0, rise * total), max(1.0, fade * total)
    return lambda step: level * min(1.0, (step + 1) / up) * min(1.0, (total - step) / down)


def is_time(done: int, every: int, total: int) -> bool:
    """Whether the action due every `every` steps is due after `done` steps; always at the end."""
    return done == total or (every > 0 and done % every == 0)
