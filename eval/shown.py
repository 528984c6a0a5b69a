"""What `dino-kd visualize` shows: a few images of a file, a folder, a data set or a video."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dino_kd.data.dataset import ImageDataset, subset
from dino_kd.data.held import HeldImages
from dino_kd.data.images import ARRAY_EXTENSION, EXTENSIONS, BrokenImage, decode_image
from dino_kd.data.loader import EvalTransform
from dino_kd.data.video import Video, is_video, open_video, read_frames
from dino_kd.errors import DataError
from dino_kd.models.backbone import Backbone
from dino_kd.schema import VisualizeConfig

from .subject import open_images

_LONGEST = 4  # times the shorter side; the ends of longer images are cut off


@dataclass
class Shown:
    """The images of a visualization, decoded.

    Attributes:
        dataset: the readable ones, and nothing else.
        images: uint8 ``[H, W, C]`` each.
        names: what to call them, in letters that any file can hold.
        video: the film that they are frames of.
        available: images or frames that they were chosen from.
        broken: chosen, but not readable.
    """

    dataset: ImageDataset
    images: list[np.ndarray]
    names: list[str]
    video: Video | None
    available: int
    broken: list[BrokenImage] = field(default_factory=list)

    def class_name(self, index: int) -> str:
        """The class of image `index`, empty when there are none."""
        if self.dataset.labels is None or self.dataset.class_names is None:
            return ""
        return plain(self.dataset.class_names[int(self.dataset.labels[index])])


def open_shown(settings: VisualizeConfig, channels: int) -> Shown:
    """Decode up to `max_images`, evenly spaced. Raises UserError."""
    path = Path(settings.input).expanduser()
    if is_video(path):
        return _open_video(str(path), settings, channels)
    if path.is_file() and path.suffix.lower() in EXTENSIONS | {ARRAY_EXTENSION}:
        try:
            image = decode_image(path, channels)
        except BrokenImage as error:
            raise DataError(f"input: cannot read {error}") from None
        held = HeldImages([image], [str(path)], str(path))
        return Shown(held, [image], [plain(path.name)], None, 1)
    dataset = open_images(settings, "input", channels)
    images: list[np.ndarray] = []
    kept: list[int] = []
    broken: list[BrokenImage] = []
    for index in evenly_spaced(len(dataset), settings.max_images):
        try:
            images.append(dataset.read(index))
            kept.append(index)
        except BrokenImage as error:
            broken.append(error)
    if not images:
        raise DataError(
            f"input: none of the {len(broken)} images chosen from {dataset.spec} can be read; "
            f"the first is {broken[0]}"
        )
    names = [plain(dataset.path(index).rpartition("/")[2]) for index in kept]
    return Shown(subset(dataset, kept), images, names, None, len(dataset), broken)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the positions 0..count-1, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def view_of(
    backbone: Backbone, image: np.ndarray, wanted: int | Sequence[int] | None
) -> np.ndarray:
    """An image uint8 ``[H, W, C]`` as the network is shown it: uint8 ``[C, h, w]``.

    Bicubic, antialiased, as little as possible cut off.
    """
    size = view_size(backbone, (image.shape[0], image.shape[1]), wanted)
    return np.ascontiguousarray(EvalTransform(size)(image))


def view_size(
    backbone: Backbone, shape: tuple[int, int], wanted: int | Sequence[int] | None
) -> tuple[int, int]:
    """(height, width) in pixels for an image of `shape`: its aspect ratio, in whole patches.

    `wanted` is the shorter side or (height, width), None for what the network was trained at.
    Networks of one fixed size have that size.
    """
    if not takes_any_size(backbone):
        return backbone.img_size
    step = _step(backbone)
    if wanted is not None and not isinstance(wanted, int):
        height, width = (float(side) for side in wanted)
    else:
        short = wanted or min(backbone.img_size)
        height, width = (short * min(_LONGEST, side / min(shape)) for side in shape)
    return max(step, step * round(height / step)), max(step, step * round(width / step))


def takes_any_size(backbone: Backbone) -> bool:
    """Whether images of several sizes go through the network as it is."""
    return "img_size" not in backbone.model_args or getattr(backbone.net, "dynamic_img_size", False)


def plain(text: str) -> str:
    """Text without the bytes that UTF-8 cannot hold and without control characters."""
    readable = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x1f\x7f]", "?", readable)


def _step(backbone: Backbone) -> int:
    """Pixels of a patch, or of one place in the final map of a CNN."""
    if backbone.patch_size:
        return backbone.patch_size
    stages = list(getattr(backbone.net, "feature_info", None) or [])
    return int(stages[-1].get("reduction", 1)) if stages else 1


def _open_video(path: str, settings: VisualizeConfig, channels: int) -> Shown:
    video = open_video(path)
    wanted = set(evenly_spaced(len(video), settings.max_images))
    images: list[np.ndarray] = []
    names: list[str] = []
    for number, frame in enumerate(read_frames(video, channels)):
        if number in wanted:
            images.append(frame)
            names.append(f"{video.second(number):.2f} s")
        if len(images) == len(wanted):
            break
    paths = [f"{path} at {name}" for name in names]
    return Shown(HeldImages(images, paths, path), images, names, video, len(video))
