"""The colour changes of many crops on a device: planned where numbers are drawn, done there.

Which crop gets which change (`colour_steps`) is known before anything is copied, so that no step of
it waits for the device to say. The changes themselves are `torch_colour`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dino_kd.data import torch_colour
from dino_kd.data.colour_steps import ColourStep
from dino_kd.data.device_numbers import Numbers, Place


class Colouring:
    """The steps of some crops, with what they need packed into `numbers`."""

    def __init__(self, steps: list[ColourStep], numbers: Numbers) -> None:
        self._steps: list[tuple[ColourStep, Place, list[Place]]] = [
            (step, numbers.add(step.crops), [numbers.add(amount) for amount in step.amounts])
            for step in steps
        ]

    def apply(self, crops: Tensor, numbers: Numbers, *, compiled: bool = False) -> None:
        """Change crops float32 [m, 3, h, w] of whole levels in place.

        `compiled`: fuse each change by torch.compile; its first calls take seconds.
        """
        for step, place, amounts in self._steps:
            chosen = numbers.whole(place)
            some = crops.index_select(0, chosen)
            change = _compiled(step.change) if compiled else torch_colour.CHANGES[step.change]
            change(*step.constants, *(numbers.real(amount) for amount in amounts), some)
            crops.index_copy_(0, chosen, some)


@functools.cache
def _compiled(change: str) -> Callable[..., None]:
    # How many crops have it differs from batch to batch.
    return torch.compile(torch_colour.CHANGES[change], dynamic=True)
