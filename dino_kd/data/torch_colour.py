"""Colour changes, blur and solarize of many crops at once, in torch, on any device.

Crops are float32 [n, 3, h, w] that hold whole levels 0..255 and are changed in place. Every
operation ends in whole levels, as Pillow's 8-bit pictures do, so results differ by rare roundings.
Factors are float32 [n].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = (19595.0, 38470.0, 7471.0)  # Pillow's, of 65536


def luma(crops: Tensor) -> Tensor:
    """Grey levels [n, h, w], rounded as Pillow does; every step is exact in float32."""
    red, green, blue = crops.unbind(1)
    total = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return total.add_(32768.0).mul_(1 / 65536).floor_()


def _blend(crops: Tensor, base: Tensor, factors: Tensor) -> None:
    """``base + factor * (crops - base)``, cut off and without its fraction, as Pillow's blend."""
    crops.sub_(base).mul_(factors[:, None, None, None]).add_(base).clamp_(0, 255).floor_()


def brightness(factors: Tensor, crops: Tensor) -> None:
    """Towards black or away from it."""
    crops.mul_(factors[:, None, None, None]).clamp_(0, 255).floor_()


def contrast(factors: Tensor, crops: Tensor) -> None:
    """Towards the rounded mean of the grey levels or away from it."""
    grey = luma(crops)
    mean = grey.mean((1, 2), dtype=torch.float64).add_(0.5).floor_().float()
    _blend(crops, mean[:, None, None, None], factors)


def saturation(factors: Tensor, crops: Tensor) -> None:
    """Towards the grey picture or away from it."""
    _blend(crops, luma(crops)[:, None], factors)


def hue(steps: Tensor, crops: Tensor) -> None:
    """Turn the colour circle by `steps` of 256, by way of hue and saturation of 8 bits each.

    Conditions are differences of whole levels clamped to 0..1, which costs a tenth of `where`.
    """
    red, green, blue = crops.unbind(1)
    most = torch.maximum(torch.maximum(red, green), blue)
    spread = most - torch.minimum(torch.minimum(red, green), blue)
    not_green, not_red = (most - green).clamp_(max=1), (most - red).clamp_(max=1)
    if_green = (blue - red).add_(spread, alpha=2)
    if_blue = (red - green).add_(spread, alpha=4)
    sixths = (green - blue).lerp_(if_green.lerp_(if_blue, not_green), not_red)  # -1..5 times spread
    level = sixths.div_(spread.clamp(min=1)).mul_(42.5).floor_()
    # In 8 bits a whole turn is 255, so what lies below red gets 255 more after the cut.
    level.add_(level.neg().clamp_(0, 1), alpha=255).add_(steps[:, None, None])
    sector = level.add_((level - 255).clamp_(0, 1), alpha=-256).mul_(6 / 255)
    share = (spread * 255).div_(most.clamp(min=1)).floor_()
    drop = share.mul_(most).mul_(1 / 255)  # from the highest band to the lowest
    for band, centre, is_red in ((red, 3, True), (green, 2, False), (blue, 4, False)):
        tent = (sector - centre).abs_()
        tent = tent.neg_().add_(2) if is_red else tent.sub_(1)
        band.copy_(most).sub_(tent.clamp_(0, 1).mul_(drop))
    crops.add_(0.5).floor_()


def grayscale(crops: Tensor) -> None:
    """The same grey in all bands."""
    crops.copy_(luma(crops)[:, None].expand_as(crops))


def solarize(threshold: int, crops: Tensor) -> None:
    """Levels from `threshold` up are inverted."""
    inverted = (crops - (threshold - 1)).clamp_(0, 1)
    crops.add_(inverted.mul_(255 - 2 * crops))


def box_blur(whole: int, inner: Tensor, outer: Tensor, crops: Tensor) -> None:
    """Three box filters along rows, then three along columns; see `box_widths` for the numbers.

    Edge pixels are repeated, and levels rounded after every filter.
    """
    reach, levels = whole + 1, crops
    inner, outer = inner[:, None, None, None], outer[:, None, None, None]
    for dim, margins in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        size = crops.shape[dim]
        for _ in range(3):
            wide = F.pad(levels, margins, mode="replicate")
            sides = wide.narrow(dim, 0, size) + wide.narrow(dim, 2 * reach, size)
            for step in range(1, reach):
                levels = levels + wide.narrow(dim, reach - step, size)
                levels = levels.add_(wide.narrow(dim, reach + step, size))
            levels = (levels * inner).addcmul_(sides, outer).add_(0.5).floor_()
    crops.copy_(levels)


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change
    for change in (brightness, contrast, saturation, hue, grayscale, box_blur, solarize)
}
