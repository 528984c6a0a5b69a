"""Multi-crop augmentation: draw the parameters of every crop, then render them.

The recipe is DINO's (arXiv 2104.14294): resized crop, flip, colour jitter, grey, blur, solarize.
Drawing and rendering are apart, so that another renderer can take the place of the PIL one, and
the numbers depend on (seed, epoch, image) alone: never on worker, rank or where a run resumed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

_WORD = 2**64
_CROPS_KEY = 0x63726F7073  # "crops": keeps this stream apart from others of the same seed
_TRIES = 10  # as torchvision's RandomResizedCrop
_DRAWS = 2 * _TRIES + 14  # uniform numbers per crop, always all of them, in this layout:
_AREA, _ASPECT = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _H_FLIP, _V_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER = range(
    2 * _TRIES, 2 * _TRIES + 10
)
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(2 * _TRIES + 10, _DRAWS)
JITTER_ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))
COLOUR_CHANGES = ("none", "brightness", "contrast", "saturation", "hue")
_ORDER_TABLE = np.array(
    [*([COLOUR_CHANGES.index(name) for name in order] for order in JITTER_ORDERS), [0] * 4],
    dtype=np.int32,
)  # the last row is what order -1 finds
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}  # PIL's filters are antialiased


@dataclass(frozen=True)
class CropPolicy:
    """What may happen to a crop. Sizes are (height, width) in pixels; the defaults are DINO's.

    `blur` and `solarize` are probabilities for the first global crop, the second, and the locals.
    """

    global_size: tuple[int, int] = (224, 224)
    local_size: tuple[int, int] = (96, 96)
    num_global_crops: int = 2  # 1 for supervised training
    num_local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.4)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    interpolation: str = "bicubic"  # or "bilinear"
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # turns of the colour circle
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    solarize_threshold: int = 128


def supervised_policy(
    size: tuple[int, int], scale: tuple[float, float] = (0.08, 1.0), flip: float = 0.5
) -> CropPolicy:
    """One resized crop and a flip for each image: what linear probes and fine-tuning train on.

    `size` (height, width) in pixels, `scale` the range of the crop's share of the image's area.
    """
    return CropPolicy(
        global_size=size,
        num_global_crops=1,
        num_local_crops=0,
        global_scale=scale,
        horizontal_flip=flip,
        jitter=0.0,
        grayscale=0.0,
        blur=(0.0, 0.0, 0.0),
        solarize=(0.0, 0.0, 0.0),
    )


@dataclass(frozen=True)
class CropParams:
    """Everything drawn for one crop; rendering it involves no chance."""

    box: tuple[int, int, int, int]  # top, left, height, width, pixels of the image
    size: tuple[int, int]  # height, width of the result
    interpolation: str
    horizontal_flip: bool
    vertical_flip: bool
    jitter_order: tuple[str, ...]  # the order of the four colour changes; () for none
    brightness: float  # factor
    contrast: float  # factor
    saturation: float  # factor
    hue: float  # turns, -0.5..0.5
    grayscale: bool
    blur_sigma: float  # pixels of the crop; 0 for none
    solarize_threshold: int | None  # levels from here up are inverted; none for no solarizing

    @property
    def changes_colour(self) -> bool:
        """Whether anything but place, size and flips is changed."""
        rest = self.grayscale, self.blur_sigma > 0, self.solarize_threshold is not None
        return bool(self.jitter_order) or any(rest)


def crop_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of image `index` in `epoch`: Philox, keyed by seed, counted by the rest."""
    return stream(_CROPS_KEY, seed, epoch, index)


def stream(key: int, seed: int, *counter: int) -> np.random.Generator:
    """An independent generator for each (key, seed, up to three counters); stable for good.

    Philox is counter-based: the numbers of one counter never overlap another's.
    """
    first = np.array([0, *counter, *[0] * (3 - len(counter))], dtype=np.uint64)  # word 0 advances
    words = np.array([seed % _WORD, key], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=first))


@dataclass(frozen=True)
class BatchParams:
    """Everything drawn for the S crops of each of B images, globals first, as arrays.

    Attributes:
        policy: What the crops were drawn from; it holds what all share (sizes, filter, threshold).
        boxes: int64 [B, S, 4]: top, left, height, width in pixels of the image.
        horizontal_flip, vertical_flip: bool [B, S].
        jitter_order: int64 [B, S], a place in `JITTER_ORDERS`; -1 for no colour change.
        brightness, contrast, saturation: float64 [B, S], factors.
        hue: float64 [B, S], turns, -0.5..0.5.
        grayscale: bool [B, S].
        blur_sigma: float64 [B, S], pixels of the crop; 0 for none.
        solarize: bool [B, S].
    """

    policy: CropPolicy
    boxes: np.ndarray
    horizontal_flip: np.ndarray
    vertical_flip: np.ndarray
    jitter_order: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    grayscale: np.ndarray
    blur_sigma: np.ndarray
    solarize: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def crops_of(self, row: int) -> list[CropParams]:
        """The crops of one image, one by one."""
        policy = self.policy
        columns = zip(
            *(getattr(self, name)[row].tolist() for name in _COLUMNS),
            strict=True,
        )
        return [
            CropParams(
                box=tuple(box),
                size=policy.global_size if number < policy.num_global_crops else policy.local_size,
                interpolation=policy.interpolation,
                horizontal_flip=h_flip,
                vertical_flip=v_flip,
                jitter_order=JITTER_ORDERS[order] if order >= 0 else (),
                brightness=brightness,
                contrast=contrast,
                saturation=saturation,
                hue=hue,
                grayscale=gray,
                blur_sigma=sigma,
                solarize_threshold=policy.solarize_threshold if solarize else None,
            )
            for number, (box, h_flip, v_flip, order, brightness, contrast, saturation, hue, gray,
            sigma, solarize) in enumerate(columns)
        ]  # fmt: skip

    def colour_changes(self) -> np.ndarray:
        """int32 [B, S, 4]: what is done first to fourth, as places in `COLOUR_CHANGES`.

        A factor of one, or a turn of nothing, is left out: it is 0, as where there is no jitter.
        """
        changes = _ORDER_TABLE[self.jitter_order]
        for place, name in enumerate(COLOUR_CHANGES[1:], start=1):
            idle = getattr(self, name) == (0.0 if name == "hue" else 1.0)
            if idle.any():
                changes[(changes == place) & idle[..., None]] = 0
        return changes

    def hue_steps(self) -> np.ndarray:
        """int32 [B, S], 0..255: the turn as Pillow's HSV counts it, cut towards zero."""
        return (self.hue * 255).astype(np.int32) % 256


_COLUMNS = [field.name for field in fields(BatchParams)][1:]


def sample_batch(
    policy: CropPolicy,
    sizes: Sequence[tuple[int, int]] | np.ndarray,
    seed: int,
    epoch: int,
    indices: Sequence[int] | np.ndarray,
) -> BatchParams:
    """Draw the crops of B images: the numbers that `sample_crops` draws for each alone.

    Args:
        policy: What may happen.
        sizes: Height and width of each image in pixels, B pairs.
        seed: As for `crop_rng`.
        epoch: As for `crop_rng`.
        indices: B image numbers; with seed and epoch they decide everything else.
    """
    numbers = np.asarray(indices, dtype=np.uint64).tolist()
    draws = np.empty((len(numbers), _num_crops(policy), _DRAWS))
    # A new generator costs as much as all its draws; one is set to each image's counter instead.
    rng = crop_rng(seed, epoch, 0)
    state: Any = rng.bit_generator.state
    for row, number in enumerate(numbers):
        state["state"]["counter"][2] = number
        rng.bit_generator.state = state
        rng.random(out=draws[row])
    return _parameters(policy, np.asarray(sizes, dtype=np.int64).reshape(-1, 2), draws)


def sample_crops(
    policy: CropPolicy, height: int, width: int, rng: np.random.Generator
) -> list[CropParams]:
    """Draw the crops of one image of `height` x `width` pixels: the globals, then the locals.

    Each crop uses a fixed number of draws, so one crop's outcome never moves the next one's.
    Boxes follow torchvision's RandomResizedCrop: ten tries, then the largest central crop of an
    allowed aspect ratio.
    """
    draws = rng.random((1, _num_crops(policy), _DRAWS))
    return _parameters(policy, np.array([[height, width]]), draws).crops_of(0)


def _num_crops(policy: CropPolicy) -> int:
    return policy.num_global_crops + policy.num_local_crops


def _parameters(policy: CropPolicy, sizes: np.ndarray, draws: np.ndarray) -> BatchParams:
    """What the uniform numbers [B, S, 34] mean for images of `sizes` int64 [B, 2]."""
    kinds = np.array([*range(policy.num_global_crops), *[2] * policy.num_local_crops], dtype=int)
    # [S]: 0 the first global crop, 1 the second, 2 a local one
    blurs = draws[..., _BLUR] < np.array(policy.blur)[kinds]
    low, high = policy.blur_sigma
    orders = (draws[..., _ORDER] * len(JITTER_ORDERS)).astype(np.int64)
    return BatchParams(
        policy,
        boxes=_boxes(policy, sizes, kinds, draws),
        horizontal_flip=draws[..., _H_FLIP] < policy.horizontal_flip,
        vertical_flip=draws[..., _V_FLIP] < policy.vertical_flip,
        jitter_order=np.where(draws[..., _JITTER] < policy.jitter, orders, -1),
        brightness=_around(1.0, policy.brightness, draws[..., _BRIGHTNESS]),
        contrast=_around(1.0, policy.contrast, draws[..., _CONTRAST]),
        saturation=_around(1.0, policy.saturation, draws[..., _SATURATION]),
        hue=_around(0.0, policy.hue, draws[..., _HUE]),
        grayscale=draws[..., _GRAY] < policy.grayscale,
        blur_sigma=np.where(blurs, low + draws[..., _SIGMA] * (high - low), 0.0),
        solarize=draws[..., _SOLARIZE] < np.array(policy.solarize)[kinds],
    )


def _around(center: float, spread: float, draws: np.ndarray) -> np.ndarray:
    return center + (2 * draws - 1) * spread


def _boxes(
    policy: CropPolicy, sizes: np.ndarray, kinds: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Crop boxes int64 [B, S, 4] as top, left, height, width."""
    scales = np.array([policy.global_scale, policy.global_scale, policy.local_scale])[kinds]
    low, high = scales[:, :1], scales[:, 1:]  # [S, 1]
    image_heights, image_widths = sizes[:, :1], sizes[:, 1:]  # [B, 1]
    shares = low + draws[..., _AREA] * (high - low)  # [B, S, 10]
    areas = (image_heights * image_widths)[..., None] * shares
    log_low, log_high = (math.log(ratio) for ratio in policy.aspect_ratio)
    aspects = np.exp(log_low + draws[..., _ASPECT] * (log_high - log_low))  # [B, S, 10]
    widths = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    heights = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    fits = (widths > 0) & (widths <= image_widths[..., None])
    fits &= (heights > 0) & (heights <= image_heights[..., None])
    first = fits.argmax(axis=-1)[..., None]
    box_heights = np.take_along_axis(heights, first, axis=-1)[..., 0]  # [B, S]
    box_widths = np.take_along_axis(widths, first, axis=-1)[..., 0]
    tops = (draws[..., _TOP] * (image_heights - box_heights + 1)).astype(np.int64)
    lefts = (draws[..., _LEFT] * (image_widths - box_widths + 1)).astype(np.int64)
    boxes = np.stack([tops, lefts, box_heights, box_widths], axis=-1)
    none_fits = ~fits.any(axis=-1)
    for row in np.flatnonzero(none_fits.any(axis=-1)):
        height, width = sizes[row].tolist()
        boxes[row, none_fits[row]] = _central_box(height, width, policy.aspect_ratio)
    return boxes


def _central_box(height: int, width: int, ratios: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest central box of an allowed aspect ratio."""
    box_height, box_width = height, width
    if width / height < ratios[0]:
        box_height = max(1, round(width / ratios[0]))
    elif width / height > ratios[1]:
        box_width = max(1, round(height * ratios[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def render_crops(image: np.ndarray, params: list[CropParams]) -> list[np.ndarray]:
    """Cut and colour the crops of one image, by PIL: the reference back-end.

    Args:
        image: uint8 [H, W, C].
        params: One entry per crop, from `sample_crops`.

    Returns:
        One uint8 array [C, h, w] per crop, perhaps a view with other strides. Three channels are
        RGB. Otherwise hue, saturation, grayscale and solarize are left out, and each band goes
        through the rest by itself (contrast about the band's own mean).
    """
    channels = image.shape[2]
    if channels == 3:
        picture = Image.fromarray(image)
        return [np.asarray(_render(picture, crop)).transpose(2, 0, 1) for crop in params]
    bands = [Image.fromarray(np.ascontiguousarray(image[:, :, band])) for band in range(channels)]
    return [np.stack([np.asarray(_render(band, crop)) for band in bands]) for crop in params]


def _render(picture: Image.Image, crop: CropParams) -> Image.Image:
    """One crop of a picture of mode RGB or L."""
    top, left, height, width = crop.box
    # Cut, then resize, as torchvision does: resize(box=...) would read pixels beyond the box.
    picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((crop.size[1], crop.size[0]), _FILTERS[crop.interpolation])
    if crop.horizontal_flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if crop.vertical_flip:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return colour_crop(picture, crop)


def colour_crop(picture: Image.Image, crop: CropParams) -> Image.Image:
    """What follows the resize: colour, blur and solarize, for a picture of mode RGB or L."""
    is_rgb = picture.mode == "RGB"
    for change in crop.jitter_order:
        picture = _jitter(picture, change, crop, is_rgb)
    if crop.grayscale and is_rgb:
        picture = picture.convert("L").convert("RGB")
    if crop.blur_sigma > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(crop.blur_sigma))
    if crop.solarize_threshold is not None and is_rgb:
        table = [v if v < crop.solarize_threshold else 255 - v for v in range(256)]
        picture = picture.point(table * 3)
    return picture


def _jitter(picture: Image.Image, change: str, crop: CropParams, is_rgb: bool) -> Image.Image:
    if change == "brightness" and crop.brightness != 1:
        return ImageEnhance.Brightness(picture).enhance(crop.brightness)
    if change == "contrast" and crop.contrast != 1:
        return ImageEnhance.Contrast(picture).enhance(crop.contrast)
    if change == "saturation" and crop.saturation != 1 and is_rgb:
        return ImageEnhance.Color(picture).enhance(crop.saturation)
    if change == "hue" and crop.hue != 0 and is_rgb:
        return _shift_hue(picture, crop.hue)
    return picture


def _shift_hue(picture: Image.Image, turns: float) -> Image.Image:
    """Turn the colour circle; one look-up on the HSV picture, equal to torchvision's adjust_hue."""
    shift = int(turns * 255)
    same = list(range(256))
    table = [(level + shift) % 256 for level in same]
    return picture.convert("HSV").point(table + same + same).convert("RGB")


@dataclass
class Crops:
    """The crops of a batch, as uint8: normalise them on the device.

    Attributes:
        global_crops: uint8 [G, B, C, H, W].
        local_crops: uint8 [L, B, C, h, w]; L may be 0.
    """

    global_crops: torch.Tensor
    local_crops: torch.Tensor

    @property
    def batch_size(self) -> int:
        """Images in this batch, B."""
        return self.global_crops.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Crops:
        """The same crops on `device`."""
        return Crops(
            self.global_crops.to(device, non_blocking=non_blocking),
            self.local_crops.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Crops:
        """The same crops in page-locked memory."""
        return Crops(self.global_crops.pin_memory(), self.local_crops.pin_memory())

    def chunk(self, n: int) -> list[Crops]:
        """Split the images into `n` equal parts, as views. Raises ValueError if B % n != 0."""
        if n < 1 or self.batch_size % n:
            raise ValueError(f"{self.batch_size} images cannot be split into {n} equal parts")
        size = self.batch_size // n
        return [
            Crops(self.global_crops[:, i : i + size], self.local_crops[:, i : i + size])
            for i in range(0, self.batch_size, size)
        ]
