"""Batches for training (multi-crop) and for evaluation (one view), by threads, processes or none.

What a batch holds follows from (seed, step) alone, so ranks, workers and a resumed run agree.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dino_kd.data.crop_maker import (
    CropBatch,
    CropMaker,
    CropRequests,
    epoch_order,
    steps_per_epoch,
)
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.decoded import DecodedBatch
from dino_kd.data.images import BrokenImage
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.processes import run_in_processes
from dino_kd.data.renderers import DeviceRenderer, Renderer, make_renderer
from dino_kd.data.threads import run_in_threads
from dino_kd.errors import ConfigError, DataError, UserError

WORKERS = ("auto", "threads", "processes")


@dataclass(frozen=True)
class EvalTransform:
    """Resize and cut out the centre.

    Attributes:
        size: (height, width) of the result in pixels.
        resize: Length of the shorter side before the cut; none: just cover `size`.
        interpolation: "bicubic" or "bilinear", both antialiased.
    """

    size: tuple[int, int]
    resize: int | None = None
    interpolation: str = "bicubic"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] to uint8 [C, h, w]. A `resize` too small to cover `size` is raised."""
        scaled_height, scaled_width = self._scaled(image.shape[0], image.shape[1])
        height, width = self.size
        top, left = round((scaled_height - height) / 2), round((scaled_width - width) / 2)
        cut = (left, top, left + width, top + height)
        resample = Image.Resampling[self.interpolation.upper()]

        def view(pixels: np.ndarray) -> np.ndarray:
            picture = Image.fromarray(pixels)
            if picture.size != (scaled_width, scaled_height):
                picture = picture.resize((scaled_width, scaled_height), resample)
            return np.asarray(picture if picture.size == (width, height) else picture.crop(cut))

        if image.shape[2] == 3:
            return view(image).transpose(2, 0, 1)
        bands = [view(np.ascontiguousarray(image[:, :, c])) for c in range(image.shape[2])]
        return np.stack(bands)

    def _scaled(self, image_height: int, image_width: int) -> tuple[int, int]:
        height, width = self.size
        if self.resize is not None:  # as torchvision: the longer side is cut down to an integer
            short = min(image_height, image_width)
            scaled = (self.resize * image_height // short, self.resize * image_width // short)
            if scaled[0] >= height and scaled[1] >= width:
                return scaled
        scale = max(height / image_height, width / image_width)
        return max(height, round(image_height * scale)), max(width, round(image_width * scale))


def crop_batches(
    dataset: ImageDataset,
    policy: CropPolicy | Callable[[int], CropPolicy],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    renderer: Renderer | None = None,
    workers: str = "auto",
) -> Generator[CropBatch, None, None]:
    """This rank's batches of the steps `start_step` .. `total_steps` - 1.

    Draws from (seed, epoch, image) only; `renderer` (the fastest one when None) turns the draws
    into pixels; a `DeviceRenderer` leaves them on its device. `policy` may be a function of the
    0-based step: each request carries its own along.
    `batch_size` is global. Epoch e is one permutation; its global batch t is entries t*B .. (t+1)*B
    of it, and rank r takes the r-th of `world_size` equal slices.
    One iterator runs over all steps, so loading does not pause between epochs. Closing it
    (`close()`, or reaching the end) ends the workers: `num_workers` threads or processes as
    `worker_kind` says, which make the same bytes.

    A broken image is replaced by another one, drawn from (seed, epoch, image, attempt) and
    augmented with the broken one's parameters.

    Raises:
        ConfigError: `batch_size` is not divisible by `world_size`, or no such `workers`.
        DataError: fewer images than one batch (now); 20 replacements in a row are broken, or a
            worker process died (while iterating).
    """
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size must be divisible by the number of processes, got {batch_size} images "
            f"and {world_size} processes"
        )
    if steps_per_epoch(len(dataset), batch_size) == 0:
        raise DataError(
            f"{dataset.spec} has {len(dataset)} images, fewer than one batch of {batch_size}. "
            f"Set optim.batch_size to {len(dataset)} or less, or add images."
        )
    requests = CropRequests(
        len(dataset), batch_size, seed, range(start_step, total_steps), rank, world_size, policy
    )
    maker = CropMaker(dataset, seed, renderer or make_renderer())
    if num_workers and worker_kind(workers, maker.renderer) == "threads":
        pin = pin_memory and torch.cuda.is_available()
        made = run_in_threads(maker, requests, num_workers, pin_memory=pin)
    else:
        made = run_in_processes(maker, requests, num_workers, pin_memory)
    if isinstance(maker.renderer, DeviceRenderer):
        return _on_device(made, maker.renderer)
    return made


def _on_device(
    decoded: Generator[DecodedBatch, None, None], renderer: DeviceRenderer
) -> Generator[CropBatch, None, None]:
    """Batches rendered when they are asked for. Closing this closes `decoded`."""
    try:
        for batch in decoded:
            made = CropBatch(renderer.crops_of(batch), batch.indices, batch.broken)
            del batch  # else its memory would be held until the next one is ready
            yield made
            del made
    finally:
        decoded.close()


def worker_kind(workers: str, renderer: Renderer) -> str:
    """What makes batches: "threads" or "processes".

    auto: threads when the renderer lets go of Python's lock; with others they would take turns.
    """
    if workers not in WORKERS:
        raise ConfigError(f"no workers {workers!r}; accepted are {', '.join(WORKERS)}")
    if workers != "auto":
        return workers
    return "threads" if renderer.releases_gil else "processes"


def image_batches(
    dataset: ImageDataset,
    indices: Sequence[int] | np.ndarray | torch.Tensor,
    transform: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_broken: Callable[[BrokenImage], None] | None = None,
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """The images `indices`, in that order, as (uint8 [B, C, h, w], int64 indices [B]).

    Broken images are left out and handed to `on_broken`; a batch may thus be smaller, and one
    without any image is not given out. `transform` must be picklable (such as `EvalTransform`).
    """
    indices = np.asarray(indices, dtype=np.int64).reshape(-1)
    requests = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    made = run_in_processes(_ViewMaker(dataset, transform), requests, num_workers, pin_memory)
    return _whole(made, on_broken)


def _whole(
    made: Generator[_Views, None, None], on_broken: Callable[[BrokenImage], None] | None
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    try:
        for views in made:
            if on_broken is not None:
                for broken in views.broken:
                    on_broken(broken)
            if views.images is not None:
                yield views.images, views.indices
    finally:
        made.close()


@dataclass
class _Views:
    images: torch.Tensor | None
    indices: torch.Tensor
    broken: list[BrokenImage]

    def pin_memory(self) -> _Views:
        images = None if self.images is None else self.images.pin_memory()
        return _Views(images, self.indices, self.broken)


@dataclass
class _ViewMaker:
    """Makes a batch of transformed images, without the broken ones."""

    dataset: ImageDataset
    transform: Callable[[np.ndarray], np.ndarray]

    def __getitems__(self, indices: np.ndarray) -> _Views | UserError:
        images: torch.Tensor | None = None
        kept: list[int] = []
        broken: list[BrokenImage] = []
        try:
            for index in indices.tolist():
                try:
                    image = self.transform(self.dataset.read(index))
                except BrokenImage as error:
                    broken.append(BrokenImage(error.path, error.reason))
                    continue
                if images is None:
                    images = torch.empty((len(indices), *image.shape), dtype=torch.uint8)
                images.numpy()[len(kept)] = image
                kept.append(index)
        except UserError as error:
            return error
        return _Views(
            None if images is None else images[: len(kept)],
            torch.tensor(kept, dtype=torch.int64),
            broken,
        )


__all__ = [
    "WORKERS", "CropBatch", "EvalTransform", "crop_batches", "epoch_order", "image_batches",
    "steps_per_epoch", "worker_kind",
]  # fmt: skip
