"""What the retrieval evaluators share: a backbone, a view of whole images, their descriptors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.specs import make_dataset
from dino_kd.descriptors import describe, learn_whitening
from dino_kd.distributed import is_main_process, processes_here, world_size
from dino_kd.engine.precision import choose_precision
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.features import OUTPUT, FeatureBank, extract_with, pixel_features
from dino_kd.models.backbone import Backbone
from dino_kd.presets import loader_processes
from dino_kd.schema import BackboneSettings, CopydetectConfig, RetrievalConfig

from .results import describe_images
from .subject import PIXELS, open_backbone

PIXEL_SIZE = 32  # of `backbone=pixels`
FORWARD_FAILURES = (RuntimeError, ValueError, AssertionError, IndexError)  # of an unfitting size


@dataclass
class Describer:
    """A backbone (None: the pixels themselves) and how images become descriptors.

    Attributes:
        backbone: in eval mode, at the size it was trained for; other sizes resample its positions.
        description: what a result says about it.
        multiple: of pixels that the sides of an image are cut to.
        parts: as `dino_kd.descriptors.describe`, as well as `gem_power` and `scales`.
    """

    backbone: Backbone | None
    description: dict[str, Any]
    transform: Callable[[np.ndarray], np.ndarray]
    multiple: int
    parts: tuple[str, ...]
    gem_power: float
    scales: tuple[float, ...]
    batch_size: int
    num_workers: int
    device: torch.device
    precision: str

    @property
    def channels(self) -> int:
        """Of the images."""
        return 3 if self.backbone is None else self.backbone.in_chans

    def bank(self, images: ImageDataset, name: str, *, complete: bool = True) -> FeatureBank:
        """The descriptors of all images; every process calls this and gets the whole bank.

        Args:
            images: what to describe.
            name: for the progress bar and for messages.
            complete: every image is needed; else broken ones are left out.

        Raises:
            DataError: an image of a complete set, or every image, cannot be read.
            CheckpointError: descriptors that are not finite.
        """
        share = -(-len(images) // world_size())
        hidden = None if is_main_process() else True  # on a terminal, from the main process
        with tqdm(total=share, desc=name, unit="image", disable=hidden, leave=False) as bar:
            bank = self._extract(images, bar.update)
        if complete and bank.broken:
            raise DataError(
                f"{name}: {len(bank.broken)} of {len(images)} images cannot be read, the first is "
                f"{bank.broken[0]}. The benchmark counts every image: copy or download them again."
            )
        if not torch.isfinite(bank.features).all():
            raise CheckpointError(
                f"backbone: {self.description['source']} gives features that are not finite on the "
                f"{name} images; its weights are damaged or its training diverged"
            )
        return bank

    def _extract(self, images: ImageDataset, on_batch: Callable[[int], object]) -> FeatureBank:
        backbone = self.backbone
        if backbone is None:
            return pixel_features(
                images,
                size=PIXEL_SIZE,
                resize=PIXEL_SIZE,
                num_workers=self.num_workers,
                on_batch=on_batch,
            )

        def described(views: Tensor) -> dict[str, Tensor]:
            found = describe(
                backbone,
                views,
                parts=self.parts,
                gem_power=self.gem_power,
                scales=self.scales,
                multiple=self.multiple,
            )
            return {OUTPUT: found}

        return extract_with(
            backbone,
            images,
            self.transform,
            described,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            precision=self.precision,
            on_batch=on_batch,
        )


def open_describer(
    settings: RetrievalConfig | CopydetectConfig,
    device: torch.device,
    view: Callable[[int], Callable[[np.ndarray], np.ndarray]],
    scales: tuple[float, ...] = (1.0,),
) -> Describer:
    """Load what `settings` names; `view` makes the images' transform for sides of whole multiples.

    Raises:
        UserError: no such backbone, or one that takes a single size only.
    """
    backbone, description = open_network(settings, device)
    multiple = 1 if backbone is None else side_multiple(backbone, device)
    return Describer(
        backbone=backbone,
        description=description,
        transform=view(multiple),
        multiple=multiple,
        parts=tuple(settings.features.split("+")),
        gem_power=settings.gem_power,
        scales=scales,
        batch_size=settings.batch_size,
        num_workers=loader_processes(settings.num_workers, processes_here()),
        device=device,
        precision="fp32" if backbone is None else choose_precision(settings.precision, device),
    )


def open_network(
    settings: BackboneSettings, device: torch.device
) -> tuple[Backbone | None, dict[str, Any]]:
    """The network at its own size, None for pixels, and what a result says about it."""
    if settings.backbone == PIXELS:
        return None, {"source": PIXELS}
    # these benchmarks' `image_size` is that of the images, which vary; positions are resampled
    # from the trained grid to each of them, once
    return open_backbone(settings.model_copy(update={"image_size": None}), device)


def side_multiple(backbone: Backbone, device: torch.device) -> int:
    """What the sides of an image must be a multiple of, in pixels, found by trying.

    The patch of a ViT; 1 for most CNNs; the first patch of a hierarchical network (Swin: 4).

    Raises:
        ConfigError: the network takes no other aspect ratio than its own.
    """
    sides = (backbone.patch_size,) if backbone.patch_size else (1, 2, 4, 8, 16, 32)
    for side in sides:
        size = (64 // side * side + side, 96 // side * side + side)
        probe = torch.zeros(1, backbone.in_chans, *size, device=device)
        try:
            with torch.no_grad():
                backbone(probe)
        except FORWARD_FAILURES as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        return side
    raise ConfigError(
        f"backbone: {backbone.name} takes one image size only, and this command shows it several "
        f"({reason}); use a plain ViT or a CNN"
    )


def describe_protocol(describer: Describer, settings: RetrievalConfig | CopydetectConfig) -> dict:
    """How images become descriptors, for a result."""
    if describer.backbone is None:
        return {"features": f"pixels, {PIXEL_SIZE} x {PIXEL_SIZE}", "whiten": settings.whiten}
    found: dict[str, Any] = {
        "image_size": settings.image_size,
        "side_multiple": describer.multiple,
        "interpolation": "bicubic",
        "precision": describer.precision,
        "features": settings.features,
        "scales": [round(scale, 4) for scale in describer.scales],
        "whiten": settings.whiten,
    }
    if "gem" in describer.parts:
        found["gem_power"] = settings.gem_power
    return found


def open_extra(describer: Describer, spec: str | None, name: str) -> ImageDataset | None:
    """The images of the setting `name`, None for none. Raises UserError."""
    if spec is None:
        return None
    images = make_dataset(spec, channels=describer.channels, where=name)
    if name == "whiten" and len(images) < 2:
        raise DataError(f"whiten: {spec} holds one image; whitening is learned from many.")
    return images


def whitened(
    describer: Describer, images: ImageDataset | None, data: dict[str, Any], notes: list[str]
) -> Callable[[Tensor], Tensor]:
    """Descriptors to unit vectors ``[N, D]``, after a whitening learned from `images`, if any.

    What was learned from goes into `data`; too few images are a sentence in `notes`.
    """
    if images is None:
        return lambda features: F.normalize(features, dim=1)
    bank = describer.bank(images, "whiten", complete=False)
    data["whiten"] = describe_images(images, bank)
    count, width = bank.features.shape
    if count < 2:
        raise DataError(f"whiten: {images.spec} has one image that can be read; many are needed.")
    if count <= width:
        notes.append(
            f"whitening was learned from {count} images, fewer than the {width} dimensions; DINO's "
            "takes 20,000"
        )
    whitening = learn_whitening(bank.features)
    return lambda features: F.normalize(whitening(features), dim=1)
