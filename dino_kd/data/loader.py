"""Batches for training (multi-crop) and for evaluation (one view), by worker processes or none.

What a batch holds follows from (seed, step) alone, so ranks, workers and a resumed run agree.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.multicrop import (
    CropPolicy,
    Crops,
    sample_batch,
    stream,
)
from dino_kd.data.renderers import Renderer, make_renderer
from dino_kd.errors import ConfigError, DataError, UserError

_ORDER_KEY = 0x6F72646572  # "order": the permutation of an epoch
_REPLACEMENT_KEY = 0x72657064  # "repl": the image that stands in for a broken one
_MAX_REPLACEMENTS = 20
_RENDER_TOGETHER = 2**20  # bytes of decoded images: many small ones in one call, few large ones
_IGNORED_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


@dataclass
class CropBatch:
    """One step's crops.

    Attributes:
        crops: The crops of B images.
        indices: int64 [B], the images shown (a replacement stands under its own index).
        broken: What could not be read while this batch was made.
    """

    crops: Crops
    indices: torch.Tensor
    broken: list[BrokenImage] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> CropBatch:
        """The same batch with its crops on `device`; the indices stay where they are."""
        return CropBatch(self.crops.to(device, non_blocking), self.indices, self.broken)

    def pin_memory(self) -> CropBatch:
        """The same batch with its crops in page-locked memory."""
        return CropBatch(self.crops.pin_memory(), self.indices, self.broken)


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


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Full global batches in one pass over the images; the incomplete last one is dropped."""
    return num_images // batch_size


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images in `epoch`: a permutation int64 [N], drawn from (seed, epoch)."""
    return stream(_ORDER_KEY, seed, epoch).permutation(num_images)


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
) -> Generator[CropBatch, None, None]:
    """This rank's batches of the steps `start_step` .. `total_steps` - 1.

    Draws from (seed, epoch, image) only; `renderer` (the fastest one when None) turns the draws
    into pixels. `policy` may be a function of the 0-based step: called here, and carried along by
    each request. `batch_size` is global. Epoch e is one permutation; its
    global batch t is entries t*B .. (t+1)*B of it, and rank r takes the r-th of `world_size`
    equal slices. One iterator runs over all steps, so loading does not pause between epochs.
    Closing it (`close()`, or reaching the end) ends the worker processes.

    A broken image is replaced by another one, drawn from (seed, epoch, image, attempt) and
    augmented with the broken one's parameters.

    Raises:
        ConfigError: `batch_size` is not divisible by `world_size`.
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
    requests = _CropRequests(
        len(dataset), batch_size, seed, range(start_step, total_steps), rank, world_size, policy
    )
    maker = _CropMaker(dataset, seed, renderer or make_renderer())
    return _run(maker, requests, num_workers, pin_memory)


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
    made = _run(_ViewMaker(dataset, transform), requests, num_workers, pin_memory)
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


@dataclass(frozen=True)
class _CropRequests:
    """For each step: its epoch, the images of this rank, and what may happen to their crops."""

    num_images: int
    batch_size: int
    seed: int
    steps: range
    rank: int
    world_size: int
    policy: CropPolicy | Callable[[int], CropPolicy]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, CropPolicy]]:
        per_epoch = steps_per_epoch(self.num_images, self.batch_size)
        share = self.batch_size // self.world_size
        current, order = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            epoch, batch = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, self.num_images)
            begin = batch * self.batch_size + self.rank * share
            policy = self.policy if isinstance(self.policy, CropPolicy) else self.policy(step)
            yield epoch, order[begin : begin + share].copy(), policy


@dataclass
class _CropMaker:
    """Makes a whole batch per request, in one buffer per crop group."""

    dataset: ImageDataset
    seed: int
    renderer: Renderer

    def __getitems__(self, request: tuple[int, np.ndarray, CropPolicy]) -> CropBatch | UserError:
        epoch, indices, policy = request
        shown = indices.copy()
        crops: Crops | None = None
        broken: list[BrokenImage] = []
        read: list[np.ndarray] = []
        size = 0
        try:
            for slot, index in enumerate(indices.tolist()):
                image, shown[slot] = self._read(epoch, index, broken)
                read.append(image)
                size += image.size
                crops = crops or _buffers(policy, len(indices), image.shape[2])
                if slot + 1 == len(indices) or size >= _RENDER_TOGETHER:
                    first, size = slot + 1 - len(read), 0
                    self._render(crops, policy, read, epoch, indices[first : slot + 1], first)
                    read.clear()
        except UserError as error:  # carried to the main process, free of the loader's traceback
            return error
        assert crops is not None  # a batch has at least one image
        return CropBatch(crops, torch.from_numpy(shown), broken)

    def _render(
        self,
        crops: Crops,
        policy: CropPolicy,
        images: list[np.ndarray],
        epoch: int,
        indices: np.ndarray,
        first: int,
    ) -> None:
        """Fill the places from `first` on with the crops of `images`."""
        sizes = [image.shape[:2] for image in images]
        params = sample_batch(policy, sizes, self.seed, epoch, indices)
        buffers = crops.global_crops.numpy(), crops.local_crops.numpy()
        self.renderer.render(images, params, *buffers, range(first, first + len(images)))

    def _read(self, epoch: int, index: int, broken: list[BrokenImage]) -> tuple[np.ndarray, int]:
        """The image, or the first readable replacement, and its index."""
        candidate = index
        for attempt in range(_MAX_REPLACEMENTS + 1):
            try:
                return self.dataset.read(candidate), candidate
            except BrokenImage as error:
                broken.append(BrokenImage(error.path, error.reason))  # without its traceback
            rng = stream(_REPLACEMENT_KEY, self.seed, epoch, index, attempt)
            candidate = int(rng.integers(len(self.dataset)))
        raise DataError(
            f"{self.dataset.spec}: {_MAX_REPLACEMENTS + 1} images in a row cannot be read; the "
            f"last one is {broken[-1]}"
        )


def _buffers(policy: CropPolicy, batch: int, channels: int) -> Crops:
    return Crops(
        torch.empty(
            (policy.num_global_crops, batch, channels, *policy.global_size), dtype=torch.uint8
        ),
        torch.empty(
            (policy.num_local_crops, batch, channels, *policy.local_size), dtype=torch.uint8
        ),
    )


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


def _run(
    maker: Any, requests: Iterable[Any], num_workers: int, pin_memory: bool
) -> Generator[Any, None, None]:
    """Serve the requests in order; end the workers however the iteration ends."""
    workers: dict[str, Any] = {}
    if num_workers:
        # fork shares the data set's index with the workers; elsewhere the platform's default
        start = "fork" if sys.platform == "linux" else None
        workers = {"multiprocessing_context": start, "worker_init_fn": _set_up_worker}
    loader: DataLoader[Any] = DataLoader(
        maker,
        batch_sampler=requests,
        collate_fn=_as_made,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # without CUDA it only warns
        generator=torch.Generator(),  # else each loader draws a seed from the training's generator
        **workers,
    )
    with _signals_blocked():  # workers inherit this for ever, from their first instruction on
        batches = iter(loader)
    try:
        while True:
            try:
                made = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _worker_death(error) from error
            if isinstance(made, UserError):
                raise made
            yield made
    finally:
        _end_workers(batches)


def _as_made(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold back what a cluster sends to every process of a job, for processes started in here.

    A worker that a signal ends between its fork and `_set_up_worker` would end the run in error.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = [getattr(signal, name) for name in _IGNORED_SIGNALS]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for name in _IGNORED_SIGNALS:  # the main process decides when a run ends
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _worker_death(error: RuntimeError) -> Exception:
    text = str(error)
    if "DataLoader worker" not in text or "Caught" in text:
        return error
    return DataError(
        "a data-loading process died; mostly that means that memory (or shared memory, /dev/shm) "
        f"ran out. Use fewer data.num_workers or a smaller batch. torch says: {text[:200]}"
    )


def _end_workers(batches: Any) -> None:
    """Stop the loader's processes now, not whenever the garbage collector comes by."""
    processes = getattr(batches, "_workers", ())
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
    for process in processes:
        if process.is_alive():  # stuck in a read; it ignores SIGTERM, and holds nothing to save
            process.kill()
