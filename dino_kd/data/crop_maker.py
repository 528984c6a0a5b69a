"""Fill one batch of crops: read its images, replace the broken ones, render into one buffer.

Loader processes fill a whole batch each; loader threads fill one together, a range of places
each. The bytes are the same. For the device renderer they gather the images as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.decoded import Allocate, DecodedBatch, Gathering, Size, in_new_memory
from dino_kd.data.images import BrokenImage
from dino_kd.data.multicrop import BatchParams, CropPolicy, Crops, sample_batch, stream
from dino_kd.data.renderers import DeviceRenderer, Renderer
from dino_kd.errors import DataError, UserError

_ORDER_KEY = 0x6F72646572  # "order": the permutation of an epoch
_REPLACEMENT_KEY = 0x72657064  # "repl": the image that stands in for a broken one
_MAX_REPLACEMENTS = 20
# Decoded pixels that a thread gathers before it renders them: enough small images for one call,
# few enough photographs to stay in the processor's cache (and 16 threads within 100 MB).
_GATHERED_BYTES = 4 * 2**20

Request = tuple[int, np.ndarray, CropPolicy]  # epoch, images, what may happen to their crops


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


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Full global batches in one pass over the images; the incomplete last one is dropped."""
    return num_images // batch_size


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images in `epoch`: a permutation int64 [N], drawn from (seed, epoch)."""
    return stream(_ORDER_KEY, seed, epoch).permutation(num_images)


@dataclass(frozen=True)
class CropRequests:
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

    def __iter__(self) -> Iterator[Request]:
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
class CropMaker:
    """Makes the batch of a request."""

    dataset: ImageDataset
    seed: int
    renderer: Renderer

    def __getitems__(self, request: Request) -> CropBatch | DecodedBatch | UserError:
        """The whole batch, for a loader process; an error is carried home without a traceback."""
        batch = self.open(request)
        try:
            batch.fill(0, len(batch))
        except UserError as error:
            return error
        return batch.result()

    def open(self, request: Request, allocate: Allocate = in_new_memory) -> OpenBatch:
        """A batch to be filled; `allocate` gives its two buffers once the channels are known."""
        return OpenBatch(self, *request, allocate)


class OpenBatch:
    """A batch in the making. Threads may fill different places at the same time."""

    def __init__(
        self,
        maker: CropMaker,
        epoch: int,
        indices: np.ndarray,
        policy: CropPolicy,
        allocate: Allocate,
    ) -> None:
        self._maker, self._epoch, self._indices = maker, epoch, indices
        self._content: Gathering | _Rendering
        # No method of this batch: that would be a circle, and keep its memory for longer.
        draw = functools.partial(_draw, policy, maker.seed, epoch, indices)
        if isinstance(maker.renderer, DeviceRenderer):
            self._content = Gathering(len(indices), draw, allocate)
        else:
            self._content = _Rendering(maker.renderer, len(indices), draw, allocate)
        self._shown = indices.copy()
        self._broken: dict[int, list[BrokenImage]] = {}  # by place

    def __len__(self) -> int:
        return len(self._indices)

    def fill(self, begin: int, end: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read and render the images at places `begin` .. `end` - 1; give up when `stopped`.

        Raises DataError when 20 replacements of an image in a row are broken.
        """
        block = self._read_block(begin, end)
        if block is not None:
            self._content.add(block, begin)
            return
        images: list[np.ndarray] = []
        gathered = 0
        for place in range(begin, end):
            if stopped():
                return
            images.append(self._read(place))
            gathered += images[-1].nbytes
            if gathered >= _GATHERED_BYTES or place == end - 1:
                self._content.add(images, place + 1 - len(images))
                images, gathered = [], 0

    def result(self) -> CropBatch | DecodedBatch:
        """The batch; only once every place is filled."""
        broken = [image for place in sorted(self._broken) for image in self._broken[place]]
        return self._content.batch(torch.from_numpy(self._shown), broken)

    def _read_block(self, begin: int, end: int) -> np.ndarray | None:
        """uint8 [end - begin, H, W, C] from a set that keeps pixels, unless one is broken."""
        read_block = getattr(self._maker.dataset, "read_block", None)
        return None if read_block is None else read_block(self._indices[begin:end])

    def _read(self, place: int) -> np.ndarray:
        """The image of this place, or its first readable replacement."""
        maker, index = self._maker, int(self._indices[place])
        candidate = index
        for attempt in range(_MAX_REPLACEMENTS + 1):
            try:
                image = maker.dataset.read(candidate)
            except BrokenImage as error:
                broken = BrokenImage(error.path, error.reason)  # without its traceback
                self._broken.setdefault(place, []).append(broken)
            else:
                self._shown[place] = candidate
                return image
            rng = stream(_REPLACEMENT_KEY, maker.seed, self._epoch, index, attempt)
            candidate = int(rng.integers(len(maker.dataset)))
        raise DataError(
            f"{maker.dataset.spec}: {_MAX_REPLACEMENTS + 1} images in a row cannot be read; the "
            f"last one is {broken}"
        )


def _draw(
    policy: CropPolicy,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    begin: int,
    sizes: Sequence[Size] | np.ndarray,
) -> BatchParams:
    """The numbers at the places from `begin` on; a replacement takes the broken image's."""
    return sample_batch(policy, sizes, seed, epoch, indices[begin : begin + len(sizes)])


class _Rendering:
    """Renders images into the buffers of the batch, as they come."""

    def __init__(
        self,
        renderer: Renderer,
        count: int,
        draw: Callable[[int, Sequence[Size] | np.ndarray], BatchParams],
        allocate: Allocate,
    ) -> None:
        self._renderer, self._count = renderer, count
        self._draw, self._allocate = draw, allocate
        self._lock = threading.Lock()
        self._crops: Crops | None = None
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, images: Any, begin: int) -> None:
        """Render `images`, a list or one array, which stand at the places from `begin` on."""
        sizes = (
            np.broadcast_to(images.shape[1:3], (len(images), 2))
            if isinstance(images, np.ndarray)
            else [image.shape[:2] for image in images]
        )
        params = self._draw(begin, sizes)
        buffers = self._buffers(images[0].shape[2], params.policy)
        self._renderer.render(images, params, *buffers, range(begin, begin + len(images)))

    def batch(self, indices: torch.Tensor, broken: list[BrokenImage]) -> CropBatch:
        """The batch; only once every place is filled."""
        assert self._crops is not None  # a batch has at least one image
        return CropBatch(self._crops, indices, broken)

    def _buffers(self, channels: int, policy: CropPolicy) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._arrays is None:
                self._crops = Crops(
                    *self._allocate(
                        (policy.num_global_crops, self._count, channels, *policy.global_size),
                        (policy.num_local_crops, self._count, channels, *policy.local_size),
                    )
                )
                self._arrays = self._crops.global_crops.numpy(), self._crops.local_crops.numpy()
            return self._arrays
