"""The colour changes of many crops on a device: planned where numbers are drawn, done there.

Which crop gets which change is known before anything is copied, so that no step of it waits for the
device to say. The changes themselves are `torch_colour`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_kd.data import torch_colour
from dino_kd.data.device_numbers import Numbers, Place
from dino_kd.data.multicrop import BatchParams

Change = Callable[..., None]


@dataclass(frozen=True)
class ColourStep:
    """One change of some crops: ``change(*constants, *amounts, crops)``.

    Attributes:
        change: a function of `torch_colour`.
        crops: int64 [m], which of them.
        constants: what is the same for all.
        amounts: float [m] each.
    """

    change: Change
    crops: np.ndarray
    constants: tuple[int, ...] = ()
    amounts: tuple[np.ndarray, ...] = ()


def colour_steps(params: BatchParams, chosen: tuple[np.ndarray, ...]) -> list[ColourStep]:
    """What is done to the colours of some crops, in order.

    Each crop keeps its own order of the jitter: in every turn, those that come to the same change
    have it together. `chosen` indexes the numbers of `params` and gives [n, S] of them; crops are
    counted along its rows.
    """
    orders = params.colour_changes()[chosen].reshape(-1, 4)
    factors = [
        amount[chosen].ravel()
        for amount in (params.brightness, params.contrast, params.saturation, params.hue_steps())
    ]
    steps = []
    for turn in range(4):
        for place, change in enumerate(torch_colour.CHANGES):
            crops = np.flatnonzero(orders[:, turn] == place + 1)
            steps.append(ColourStep(change, crops, amounts=(factors[place][crops],)))
    steps.append(ColourStep(torch_colour.grayscale, np.flatnonzero(params.grayscale[chosen])))
    sigmas = params.blur_sigma[chosen].ravel()
    blurred = np.flatnonzero(sigmas > 0)
    for whole, mask, inner, outer in torch_colour.box_widths(sigmas[blurred]):
        amounts = inner, outer
        steps.append(ColourStep(torch_colour.box_blur, blurred[mask], (whole,), amounts))
    inverted = np.flatnonzero(params.solarize[chosen])
    threshold = (params.policy.solarize_threshold,)
    steps.append(ColourStep(torch_colour.solarize, inverted, threshold))
    return [step for step in steps if len(step.crops)]


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
            change = _compiled(step.change) if compiled else step.change
            change(*step.constants, *(numbers.real(amount) for amount in amounts), some)
            crops.index_copy_(0, chosen, some)


@functools.cache
def _compiled(change: Change) -> Change:
    return torch.compile(change, dynamic=True)  # their number differs from batch to batch
