"""What happens to the colours of many crops, in which order: planned once, done by any back-end.

Each crop keeps its own order of the jitter: in every turn, those that come to the same change have
it together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dino_kd.data.multicrop import COLOUR_CHANGES, BatchParams


@dataclass(frozen=True)
class ColourStep:
    """One change of some crops: ``change(*constants, *amounts, crops)``.

    Attributes:
        change: its name in `byte_colour.CHANGES` and `torch_colour.CHANGES`.
        crops: int64 [m], which of them.
        constants: what is the same for all.
        amounts: numbers [m] each.
    """

    change: str
    crops: np.ndarray
    constants: tuple[int, ...] = ()
    amounts: tuple[np.ndarray, ...] = ()


def colour_steps(params: BatchParams, chosen: tuple[np.ndarray, ...]) -> list[ColourStep]:
    """What is done to the colours of some crops, in order.

    `chosen` indexes the numbers of `params`, [B, S], and gives those of the crops, which are
    counted along its rows.
    """
    orders = params.colour_changes()[chosen].reshape(-1, 4)
    factors = [
        amount[chosen].ravel()
        for amount in (params.brightness, params.contrast, params.saturation, params.hue_steps())
    ]
    steps = []
    for turn in range(4):
        for place, change in enumerate(COLOUR_CHANGES[1:]):
            crops = np.flatnonzero(orders[:, turn] == place + 1)
            steps.append(ColourStep(change, crops, amounts=(factors[place][crops],)))
    steps.append(ColourStep("grayscale", np.flatnonzero(params.grayscale[chosen])))
    sigmas = params.blur_sigma[chosen].ravel()
    blurred = np.flatnonzero(sigmas > 0)
    for whole, mask, inner, outer in box_widths(sigmas[blurred]):
        steps.append(ColourStep("box_blur", blurred[mask], (whole,), (inner, outer)))
    inverted = np.flatnonzero(params.solarize[chosen])
    steps.append(ColourStep("solarize", inverted, (params.policy.solarize_threshold,)))
    return [step for step in steps if len(step.crops)]


def box_widths(sigmas: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """The box filters of Pillow's Gaussians, those that reach equally far together.

    Pillow's Gaussian is three boxes of fractional width along rows, then three along columns.

    Returns:
        Of each group: whole pixels on either side of the middle; bool [n], which of `sigmas` are
        in it; and of those float32 [m] the share of a whole pixel, and of the two that are cut.
    """
    variance = sigmas**2 / 3
    low = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * low + 1) * (low * (low + 1) - 3 * variance)
    radius = low + part / (6 * (variance - (low + 1) ** 2))
    groups = []
    for whole in np.unique(radius.astype(np.int64)).tolist():
        mask = radius.astype(np.int64) == whole
        inner = 1 / (2 * radius[mask] + 1)
        outer = (1 - (2 * whole + 1) * inner) / 2
        groups.append((whole, mask, inner.astype(np.float32), outer.astype(np.float32)))
    return groups
