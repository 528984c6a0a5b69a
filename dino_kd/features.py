"""From a backbone and labelled or unlabelled images to a bank of features.

Used by the offline evaluators and by the k-NN monitor during training: one code path for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import CropBatch, EvalTransform, image_batches
from dino_kd.distributed import all_gather_objects, all_gather_rows, rank, world_size
from dino_kd.errors import DataError
from dino_kd.models.backbone import Backbone, as_size, check_input_size
from dino_kd.models.kernels import kernels_for

OUTPUT = "output"  # the part that is always there: what the network itself returns
_PIXELS = 2**20  # of each channel, in one pass on a CPU: 20 images of 224 px, 1,024 of 32 px


class NothingReadable(DataError):  # noqa: N818 - reads as what it is
    """Not one of the images could be read; `broken` says why."""

    def __init__(self, message: str, broken: list[BrokenImage]) -> None:
        super().__init__(message)
        self.broken = broken


@dataclass
class FeatureBank:
    """Features of a set of images, on the CPU, complete on every process.

    Attributes:
        features: float32 ``[N, D]``, the network's output (not normalised).
        labels: int64 ``[N]``, None when the dataset has none.
        indices: int64 ``[N]``, positions in the dataset, in the order that was asked for.
        broken: images that could not be read; they have no row.
        parts: further features ``[N, D_part]`` of the same images, patches ``[N, P, Dp]``, by the
            names of `Backbone.parts`.
        cached: they were read from a file instead of computed.
    """

    features: Tensor
    labels: Tensor | None
    indices: Tensor
    broken: list[BrokenImage] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    cached: bool = False

    def part(self, name: str) -> Tensor:
        """The features of one name; ``output`` is `features`."""
        return self.features if name == OUTPUT else self.parts[name]


def extract_features(
    backbone: Backbone,
    dataset: ImageDataset,
    *,
    size: int | Sequence[int],
    resize: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    indices: Sequence[int] | None = None,
    parts: Sequence[str] = (),
    on_batch: Callable[[int], object] | None = None,
) -> FeatureBank:
    """One forward pass per image, in eval mode and without gradients.

    Under torchrun each process takes one contiguous share; no image is padded or counted twice,
    and every process returns the whole bank.

    Args:
        backbone: on `device`; its training mode is restored afterwards.
        dataset: images, in dataset order unless `indices` says otherwise.
        size: pixels of the network's input, one side or (height, width).
        resize: pixels of the shorter side before the centre crop; None: `default_resize`.
        batch_size: images per forward pass and process.
        num_workers: loader processes per process.
        device: where the network is.
        precision: "fp32" or "bf16" (autocast); the bank is float32 in both.
        indices: which images; None: all.
        parts: further features of the same forward pass, by the names of `Backbone.parts`.
        on_batch: told the number of images after every batch of this process.

    Raises:
        ConfigError: `size` does not fit the network's patch.
        NothingReadable: no image could be read.
    """
    size = as_size(size)
    check_input_size(backbone, size, where="image_size")
    names = [OUTPUT, *(name for name in parts if name != OUTPUT)]
    return extract_with(
        backbone,
        dataset,
        EvalTransform(size, resize or default_resize(size)),
        lambda images: backbone.parts(images, names),
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        precision=precision,
        indices=indices,
        on_batch=on_batch,
    )


def extract_with(
    backbone: Backbone,
    dataset: ImageDataset,
    transform: Callable[[np.ndarray], np.ndarray],
    describe: Callable[[Tensor], dict[str, Tensor]],
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    indices: Sequence[int] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> FeatureBank:
    """As `extract_features`, with another view of each image and another description of it.

    Args:
        backbone: on `device`; its training mode is restored afterwards.
        dataset: images, in dataset order unless `indices` says otherwise.
        transform: uint8 ``[H, W, C]`` to uint8 ``[C, h, w]``, picklable. Views of several sizes
            need a `batch_size` of 1.
        describe: normalised images ``[N, C, h, w]`` to features ``[N, D]`` by name, "output" among
            them.
        batch_size: images per forward pass and process.
        num_workers: loader processes per process.
        device: where the network is.
        precision: "fp32" or "bf16" (autocast); the bank is float32 in both.
        indices: which images; None: all.
        on_batch: told the number of images after every batch of this process.

    Raises:
        DataError: no image could be read.
    """
    device = torch.device(device)

    def forward(images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            made = [
                describe(backbone.preprocess(piece.to(device, non_blocking=True)))
                for piece in _pieces(images, device, len(images))
            ]
        return {name: torch.cat([piece[name] for piece in made]) for name in made[0]}

    with torch.no_grad(), evaluation_mode(backbone, device, precision):
        return _collect(
            forward,
            dataset,
            transform,
            indices,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            on_batch=on_batch,
        )


def _pieces(images: Tensor, device: torch.device, most: int) -> Sequence[Tensor]:
    """Images ``[N, C, h, w]`` as they go through a network together, at most `most` at a time.

    On a CPU a few: activations of more lie outside its caches, in memory that is asked for anew
    each time.
    """
    if device.type == "cpu":
        most = min(most, _PIXELS // images[0, 0].numel()) if len(images) else 1
    return images.split(max(1, most))


def crop_features(
    backbone: Backbone,
    batches: Iterable[CropBatch],
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    parts: Sequence[str] = (OUTPUT,),
) -> Iterator[tuple[dict[str, Tensor], CropBatch]]:
    """The features of the first crop of every image, batch by batch: eval mode, no gradients.

    What a classifier on a frozen backbone trains on when its images are augmented. The backbone
    is in eval mode until the iteration ends; its training mode is restored then.

    Args:
        backbone: on `device`.
        batches: of `crop_batches`.
        batch_size: images per forward pass; larger batches are passed in pieces.
        device: where the network is, and where the features stay.
        precision: "fp32" or "bf16" (autocast); the features are float32 in both.
        parts: names as in `Backbone.parts`.
    """
    device = torch.device(device)
    with evaluation_mode(backbone, device, precision):
        for batch in batches:
            pieces: dict[str, list[Tensor]] = {name: [] for name in parts}
            for crops in _pieces(batch.crops.global_crops[0], device, batch_size):
                with (
                    torch.no_grad(),
                    torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
                ):
                    images = backbone.preprocess(crops.to(device, non_blocking=True))
                    for name, values in backbone.parts(images, parts).items():
                        pieces[name].append(values.float())
            yield {name: torch.cat(values) for name, values in pieces.items()}, batch


def pixel_features(
    dataset: ImageDataset,
    *,
    size: int | Sequence[int],
    channels: int = 3,
    resize: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> FeatureBank:
    """The images themselves as features: pixels in 0..1, ``[N, channels * height * width]``.

    Arguments and errors as `extract_features`.
    """
    size = as_size(size)
    return _collect(
        lambda images: {OUTPUT: images.flatten(1).float() / 255},
        dataset,
        EvalTransform(size, resize or default_resize(size)),
        indices,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=False,
        on_batch=on_batch,
    )


def default_resize(size: int | Sequence[int]) -> int:
    """Shorter side in pixels before the centre crop: the crop itself up to 64 px, else 8/7 of it.

    224 gives the usual 256. For crops that are not square the longer side counts.
    """
    side = max(as_size(size))
    return side if side <= 64 else round(side * 8 / 7)


def _collect(
    forward: Callable[[Tensor], dict[str, Tensor]],
    dataset: ImageDataset,
    transform: Callable[[np.ndarray], np.ndarray],
    indices: Sequence[int] | None,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    on_batch: Callable[[int], object] | None,
) -> FeatureBank:
    """Run `forward` over this process's share of the images and gather all shares."""
    wanted = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    share = np.array_split(wanted, world_size())[rank()]
    broken: list[BrokenImage] = []
    features: dict[str, list[Tensor]] = {}
    kept = [torch.zeros(0, dtype=torch.int64)]
    for images, positions in image_batches(
        dataset,
        share,
        transform,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        on_broken=broken.append,
    ):
        for name, values in forward(images).items():
            features.setdefault(name, []).append(values.float().cpu())
        kept.append(positions)
        if on_batch is not None:
            on_batch(len(positions))
    all_indices = all_gather_rows(torch.cat(kept))
    all_broken = all_gather_objects(broken)
    if len(all_indices) == 0:
        raise NothingReadable(
            f"{dataset.spec}: none of its {len(wanted)} images could be read", all_broken
        )
    mine = {name: torch.cat(parts) for name, parts in features.items()}
    # A process without a single image learns the names and shapes from the others.
    shapes = all_gather_objects([(name, tuple(v.shape[1:])) for name, v in mine.items()])
    for name, shape in sorted(set(shapes)):
        mine[name] = all_gather_rows(mine.get(name, torch.zeros(0, *shape)))
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[all_indices]
    output = mine.pop(OUTPUT)
    return FeatureBank(output, labels, all_indices, all_broken, mine)


@contextlib.contextmanager
def evaluation_mode(backbone: Backbone, device: torch.device, precision: str) -> Iterator[None]:
    """Eval mode and the kernels for this precision; what was set before comes back."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with kernels_for(
            backbone, device.type, torch.bfloat16 if precision == "bf16" else torch.float32
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
