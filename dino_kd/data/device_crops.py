"""Crops rendered on the device that trains: loaders only read and decode.

All crops of many images are resized at once, then coloured, many together. Small numbers travel
in one copy, and nothing waits for the device. It has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.colour_steps import colour_steps
from dino_kd.data.decoded import DecodedBatch, check_channels, packed_pixels
from dino_kd.data.device_colour import Colouring
from dino_kd.data.device_numbers import Numbers, Place
from dino_kd.data.device_resize import padded_images, resized_crops
from dino_kd.data.multicrop import BatchParams, CropPolicy, Crops

# Numbers of the largest tensors that are worked on together: enough to keep a device busy, few
# enough for its memory (1.5 GB on a CPU, however large the batch). One image is never divided.
_TOGETHER = 2**27


class DeviceRenderer:
    """Renders whole batches of decoded images where they are used. RGB only.

    Args:
        device: where crops are rendered, and stay.
        compiled: fuse the colour changes by torch.compile, which has to work there.
    """

    name = "device"
    releases_gil = True  # what the loaders do for it, decoding, does

    def __init__(self, device: torch.device | str = "cpu", *, compiled: bool = False) -> None:
        self.device, self.compiled = torch.device(device), compiled

    def crops_of(self, batch: DecodedBatch) -> Crops:
        """The crops of a batch, on the device."""
        return rendered(batch, self.device, compiled=self.compiled)

    def render(
        self,
        images: Sequence[np.ndarray],
        params: BatchParams,
        globals_out: np.ndarray,
        locals_out: np.ndarray,
        slots: Sequence[int],
    ) -> None:
        """See `Renderer.render`: to the device and back, so that it compares with the others."""
        check_channels(globals_out.shape[2])
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
        crops = self.crops_of(DecodedBatch(packed_pixels(images), sizes, params))
        places = list(slots)
        globals_out[:, places] = crops.global_crops.cpu().numpy()
        locals_out[:, places] = crops.local_crops.cpu().numpy()


@torch.no_grad()
def rendered(
    batch: DecodedBatch,
    device: torch.device,
    *,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
) -> Crops:
    """The crops of a batch, uint8 on `device`.

    Args:
        batch: B images, and what was drawn for their crops.
        device: any.
        compiled: as in `DeviceRenderer`.
        dtype: of the matrix products that resize; None: float16 on CUDA, else float32. In float32
            a crop follows from its image and numbers alone, to the last bit; in half precision a
            level may also depend on the images around it.
    """
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    params, numbers = batch.params, Numbers()
    policy = params.policy
    sizes = numbers.add(batch.sizes)
    groups = [
        _Group.of(params, batch.sizes, rows, numbers)
        for rows in similar_images(batch.sizes, policy)
    ]
    numbers.send(device)
    pixels = batch.pixels.to(device, non_blocking=True)
    all_sizes = numbers.whole(sizes)
    ends = all_sizes.prod(1).cumsum(0)
    starts = ends - all_sizes.prod(1)
    made = [
        torch.empty((len(columns), len(params), 3, *size), dtype=torch.uint8, device=device)
        for columns, size in _kinds(policy)
    ]
    with torch.autocast(device.type, enabled=False):  # it would round the products
        for group in groups:
            rows = numbers.whole(group.rows)
            images = padded_images(pixels, starts[rows], all_sizes[rows], group.side)
            for crops, work in zip(made, group.works, strict=True):
                if work is None:
                    continue
                levels = work.crops(images, numbers, dtype, compiled=compiled)  # [n, S, 3, h, w]
                crops.index_copy_(1, rows, levels.transpose(0, 1).to(torch.uint8))
    return Crops(*made)


def similar_images(sizes: np.ndarray, policy: CropPolicy) -> list[np.ndarray]:
    """Groups of images that are padded to one size and worked on together.

    Args:
        sizes: int64 [B, 2], heights and widths.
        policy: what is made of them.

    Returns:
        The rows of each group, small images first, so that a large one widens few others.
    """
    order = np.argsort(sizes.max(axis=1), kind="stable")
    begins, height, width = [0], 0, 0
    for place, (next_height, next_width) in enumerate(sizes[order].tolist()):
        height, width = max(height, next_height), max(width, next_width)
        count = place + 1 - begins[-1]
        if count > 1 and count * _numbers(height, width, policy) > _TOGETHER:
            begins.append(place)
            height, width = next_height, next_width
    return np.split(order, begins[1:])


def _kinds(policy: CropPolicy) -> tuple[tuple[range, tuple[int, int]], ...]:
    """Columns of the drawn numbers, and pixels, of the global and the local crops."""
    num_globals, total = policy.num_global_crops, policy.num_global_crops + policy.num_local_crops
    return (
        (range(num_globals), policy.global_size),
        (range(num_globals, total), policy.local_size),
    )


def _numbers(height: int, width: int, policy: CropPolicy) -> int:
    """How many an image needs: pixels, narrowed lines, filter weights, crops."""
    crops = sum(
        len(columns) * (3 * height * w + w * width + h * height + 3 * h * w)
        for columns, (h, w) in _kinds(policy)
    )
    return 3 * height * width + crops


@dataclass(frozen=True)
class _Group:
    """Images that are worked on together: their rows, the padded size, the work on their crops."""

    rows: Place
    side: tuple[int, int]
    works: tuple[_Work | None, ...]  # global crops, local crops

    @classmethod
    def of(
        cls, params: BatchParams, sizes: np.ndarray, rows: np.ndarray, numbers: Numbers
    ) -> _Group:
        height, width = sizes[rows].max(axis=0).tolist()
        works = (
            _Work.of(params, np.ix_(rows, np.array(columns)), size, numbers) if columns else None
            for columns, size in _kinds(params.policy)
        )
        return cls(numbers.add(rows), (height, width), tuple(works))


@dataclass(frozen=True)
class _Work:
    """What is done for the S crops of one size of each of n images."""

    size: tuple[int, int]
    interpolation: str
    boxes: Place  # [n, S, 4]
    flips: Place  # [n, S, 2]
    colour: Colouring

    @classmethod
    def of(
        cls,
        params: BatchParams,
        chosen: tuple[np.ndarray, ...],
        size: tuple[int, int],
        numbers: Numbers,
    ) -> _Work:
        flips = np.stack([params.horizontal_flip[chosen], params.vertical_flip[chosen]], axis=-1)
        return cls(
            size,
            params.policy.interpolation,
            numbers.add(params.boxes[chosen]),
            numbers.add(flips),
            Colouring(colour_steps(params, chosen), numbers),
        )

    def crops(
        self, images: Tensor, numbers: Numbers, dtype: torch.dtype, *, compiled: bool
    ) -> Tensor:
        """The crops of `images` uint8 [n, 3, H, W]: float32 [n, S, 3, h, w]."""
        boxes, flips = numbers.whole(self.boxes), numbers.whole(self.flips) > 0
        made = resized_crops(images, boxes, flips, self.size, self.interpolation, dtype)
        self.colour.apply(made, numbers, compiled=compiled)
        return made.unflatten(0, boxes.shape[:2])
