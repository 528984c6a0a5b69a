"""Lengths written as steps (500), epochs ("10ep") or a share of the run ("5%")."""

from __future__ import annotations

import re
from typing import NamedTuple

_FORMS = "a number of steps (500), epochs ('10ep') or a share of the run ('5%')"


class ParsedLength(NamedTuple):
    """A non-negative amount and its unit: "steps", "ep" or "%"."""

    amount: float
    unit: str


def parse_length(value: int | str) -> ParsedLength:
    """Read a length. Raises ValueError with the accepted forms."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|ep|epochs?|%)?\s*", str(value))
    if not match:
        raise ValueError(f"expected {_FORMS}, got {value!r}")
    unit = {"": "steps", "s": "steps", "e": "ep", "%": "%"}[(match[2] or "")[:1]]
    amount = float(match[1])
    if unit == "steps" and amount != int(amount):
        raise ValueError(f"steps are whole numbers, got {value!r}; for a share write '{value}%'")
    if unit == "%" and amount > 100:
        raise ValueError(f"a share of the run is at most 100%, got {value!r}")
    return ParsedLength(amount, unit)


def in_steps(value: int | str, *, steps_per_epoch: int, total_steps: int | None = None) -> int:
    """Turn a length into steps. Raises ValueError for a share of a run without a length."""
    amount, unit = parse_length(value)
    if unit == "ep":
        return round(amount * steps_per_epoch)
    if unit == "%":
        if total_steps is None:
            raise ValueError(f"the run's own length cannot be a share of itself, got {value!r}")
        return round(amount / 100 * total_steps)
    return int(amount)
