"""Colour changes, blur and solarize of many crops at once, in whole numbers of 16 bits.

A processor adds and multiplies 16-bit numbers three times as fast as float32, which is what a crop
waits for once nobody compiles for it. Crops are uint8 [n, 3, h, w], contiguous, and are changed in
place. Factors are float [n] and keep the seven bits that fit beside a level, so that a result is
now and then one level from Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_LUMA = 77, 29  # red's and blue's share of the grey level, of 256; green has the rest


def _whole(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares float [n] as ``numbers / 2**bits``, with as many bits as keep a number within 128.

    255 * 128 fits 16 bits. Beyond a share of 128 every level but the base is cut off anyway.
    """
    bits = np.floor(np.log2(128 / np.maximum(np.abs(shares), 2**-7))).astype(np.int64)
    bits = np.maximum(bits, 0)
    return np.clip(np.rint(shares * 2.0**bits), -128, 128), bits


def _column(numbers: np.ndarray) -> np.ndarray:
    """[n] -> int16 [n, 1, 1], to go with crops [n, bands, pixels]."""
    return numbers.astype(np.int16)[:, None, None]


def _bands(crops: np.ndarray) -> np.ndarray:
    """The same bytes as [n, 3, pixels]."""
    return crops.reshape(*crops.shape[:2], -1)


def _luma(wide: np.ndarray) -> np.ndarray:
    """Grey levels int16 [n, 1, pixels] of levels int16 [n, 3, pixels]."""
    green = wide[:, 1:2]
    grey = (wide[:, :1] - green) * np.int16(_LUMA[0])
    grey += (wide[:, 2:] - green) * np.int16(_LUMA[1])
    grey += np.int16(128)
    grey >>= np.int16(8)
    grey += green
    return grey


def _blend(
    factors: np.ndarray, wide: np.ndarray, base: np.ndarray | np.int16, into: np.ndarray
) -> None:
    """``base + factor * (level - base)``, cut off and without its fraction, as Pillow's blend."""
    numbers, bits = _whole(factors - 1)
    moved = wide - base
    moved *= _column(numbers)
    moved >>= _column(bits)
    moved += wide
    into[...] = np.clip(moved, 0, 255, out=moved)


def brightness(factors: np.ndarray, crops: np.ndarray) -> None:
    """Towards black or away from it."""
    levels = _bands(crops)
    _blend(factors, levels.astype(np.int16), np.int16(0), levels)


def contrast(factors: np.ndarray, crops: np.ndarray) -> None:
    """Towards the rounded mean of the grey levels or away from it."""
    levels = _bands(crops)
    wide = levels.astype(np.int16)
    grey = _luma(wide)
    exact = np.int32 if grey[0].size < 2**23 else np.int64  # the larger takes twice the time
    mean = grey.sum((1, 2), dtype=exact) / grey[0].size
    _blend(factors, wide, _column(np.floor(mean + 0.5)), levels)


def saturation(factors: np.ndarray, crops: np.ndarray) -> None:
    """Towards the grey picture or away from it."""
    levels = _bands(crops)
    wide = levels.astype(np.int16)
    _blend(factors, wide, _luma(wide), levels)


def hue(steps: np.ndarray, crops: np.ndarray) -> None:
    """Turn the colour circle by `steps` of 256.

    The hue has 8 bits, as Pillow's. The brightest band stays; the others lie below it by a share
    of the spread that depends on the hue alone. Pillow rounds that spread once more, to a
    saturation of 8 bits, which is left out here: it moves a bright band by a level.
    """
    red, green, blue = _bands(crops).swapaxes(0, 1)  # [n, pixels] each
    most = np.maximum(np.maximum(red, green), blue)
    spread = most - np.minimum(np.minimum(red, green), blue)
    level = _hue_level(red, green, blue, most, spread)
    level += steps.astype(np.uint8)[:, None]  # a whole turn is 256 and wraps
    sector = level.astype(np.int16) * np.int16(6)
    sector += sector >> np.int16(8)  # a sixth of the circle is 256
    share = np.empty_like(sector)  # of the spread, in 256ths
    for band, centre, is_red in ((red, 768, True), (green, 512, False), (blue, 1024, False)):
        np.subtract(sector, np.int16(centre), out=share)
        np.abs(share, out=share)
        if is_red:
            np.subtract(np.int16(512), share, out=share)
        else:
            share -= np.int16(256)
        np.clip(share, 0, 256, out=share)
        drop = share.view(np.uint16)  # 256 * 255 + 128 fits
        drop *= spread
        drop += np.uint16(128)
        drop >>= np.uint16(8)
        np.subtract(most, drop.astype(np.uint8), out=band)


def _hue_level(
    red: np.ndarray, green: np.ndarray, blue: np.ndarray, most: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """The hue of bytes [n, pixels], uint8, in 255ths of a turn without their fraction.

    Choices are made by masks of eight bits, which costs a hundredth of `numpy.where`.
    """
    is_red = _mask(most == red)
    is_green = _mask(most == green) & ~is_red
    is_blue = ~(is_red | is_green)
    towards = (green & is_red) | (blue & is_green) | (red & is_blue)
    away = (blue & is_red) | (red & is_green) | (green & is_blue)
    start = (is_green & np.uint8(2)) | (is_blue & np.uint8(4))
    start |= is_red & _mask(towards < away) & np.uint8(6)  # just below red: the end of the turn
    sixths = spread * start.astype(np.int16)  # of a turn, times the spread
    sixths += towards
    sixths -= away
    turns = sixths.astype(np.float32)
    turns /= (spread + (spread == 0)).astype(np.float32)
    turns *= np.float32(42.5)
    return turns.astype(np.uint8)


def _mask(condition: np.ndarray) -> np.ndarray:
    """uint8, 255 where a condition bool holds."""
    return np.negative(condition.view(np.int8)).view(np.uint8)


def grayscale(crops: np.ndarray) -> None:
    """The same grey in all bands."""
    levels = _bands(crops)
    levels[...] = _luma(levels.astype(np.int16))


def solarize(threshold: int, crops: np.ndarray) -> None:
    """Levels from `threshold` up are inverted."""
    crops ^= (crops >= threshold) * np.uint8(255)


def box_blur(whole: int, inner: np.ndarray, outer: np.ndarray, crops: np.ndarray) -> None:
    """Three box filters along rows, then three along columns; see `box_widths` for the numbers.

    Edge pixels are repeated, and levels rounded after every filter. Boxes that reach one pixel
    are applied all three at once, rounded once: for them repeating the edge is the same as
    mirroring the picture there, which one wider filter can do as well.
    """
    at_once = whole == 0
    wide = np.uint16 if whole < 2 else np.uint32  # a share of a wider box needs more bits
    boxes = np.concatenate([outer[:, None], *[inner[:, None]] * (2 * whole + 1), outer[:, None]], 1)
    if at_once:
        boxes = np.stack([np.convolve(np.convolve(box, box), box) for box in boxes])
    weights = _half(boxes, bits=np.iinfo(wide).bits // 2).astype(np.int64).astype(wide)
    reach = weights.shape[1] - 1
    levels = crops
    for axis in (3, 2):
        shape, inside = list(crops.shape), (slice(None),) * axis + (slice(reach, -reach),)
        shape[axis] += 2 * reach
        padded = np.empty(shape, wide)
        padded[inside] = levels
        for _ in range(1 if at_once else 3):
            _fill_margins(padded.swapaxes(axis, 3), reach, mirrored=at_once)
            padded = _filtered(padded, 1 if axis == 3 else crops.shape[3], weights)
        levels = padded[inside]
    crops[...] = levels


def _fill_margins(levels: np.ndarray, reach: int, *, mirrored: bool) -> None:
    """Repeat the edge, or mirror the picture there, in the last dimension of a padded one."""
    size = levels.shape[-1] - 2 * reach
    for steps in range(reach):
        turn = steps % (2 * size)  # a picture of few pixels is mirrored again and again
        inwards = min(turn, 2 * size - 1 - turn) if mirrored else 0
        levels[..., reach - 1 - steps] = levels[..., reach + inwards]
        levels[..., reach + size + steps] = levels[..., reach + size - 1 - inwards]


def _half(kernels: np.ndarray, bits: int) -> np.ndarray:
    """Symmetric kernels [n, 2 reach + 1] from their middles outwards, as whole numbers.

    [n, reach + 1], with their mirrors they sum to ``2**bits``.
    """
    half = np.rint(kernels[:, kernels.shape[1] // 2 :] * 2.0**bits)
    half[:, 0] = 2**bits - 2 * half[:, 1:].sum(1)
    return half


def _filtered(levels: np.ndarray, offset: int, weights: np.ndarray) -> np.ndarray:
    """Weighted means with the neighbours `offset` numbers apart in memory, of [n, 3, h, w].

    A row, or a picture, continues in the next one, with its repeated pixels between them, so that
    every operation runs over a whole crop. Those repeated pixels come out as rubbish.
    """
    line = levels.reshape(len(levels), -1)
    made = np.empty_like(line)
    margin = (weights.shape[1] - 1) * offset
    middle = made[:, margin:-margin]
    np.multiply(line[:, margin:-margin], weights[:, :1], out=middle)
    for steps in range(1, weights.shape[1]):
        near, far = margin - steps * offset, margin + steps * offset
        sides = line[:, near : near + middle.shape[1]] + line[:, far : far + middle.shape[1]]
        sides *= weights[:, steps : steps + 1]
        middle += sides
    bits = middle.dtype.type(middle.dtype.itemsize * 4)
    middle += middle.dtype.type(1) << (bits - middle.dtype.type(1))
    middle >>= bits
    return made.reshape(levels.shape)


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change
    for change in (brightness, contrast, saturation, hue, grayscale, box_blur, solarize)
}
