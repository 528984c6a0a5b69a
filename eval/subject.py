"""What is scored: a backbone, or the pixels themselves, and how images become its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from dino_kd.cache_entries import cache_folder
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.specs import make_dataset
from dino_kd.distributed import is_main_process, processes_here, world_size
from dino_kd.engine.precision import choose_precision
from dino_kd.errors import CheckpointError, ConfigError
from dino_kd.feature_cache import FeatureCache
from dino_kd.features import FeatureBank, default_resize, extract_features, pixel_features
from dino_kd.models.backbone import Backbone, as_size
from dino_kd.presets import loader_processes
from dino_kd.pretrained import backbone_hash, load_backbone
from dino_kd.schema import FeatureSettings, SourceSettings

PIXELS = "pixels"
_PIXEL_SIZE = 32


@dataclass
class Subject:
    """A backbone (None: the pixels themselves) with everything that shapes its features."""

    backbone: Backbone | None
    channels: int
    size: tuple[int, int]
    resize: int
    batch_size: int
    num_workers: int
    device: torch.device
    precision: str
    description: dict[str, Any]
    cache: FeatureCache | None = None

    def features(self, dataset: ImageDataset, name: str, parts: Sequence[str] = ()) -> FeatureBank:
        """The features of all images of a dataset, from the cache where they are known.

        Args:
            dataset: the images.
            name: the setting they come from, for the progress bar and for messages.
            parts: further features besides the output, by the names of `Backbone.parts`.

        Raises:
            ConfigError: parts of pixels.
            CheckpointError: features that are not finite.
            UserError: no image can be read; the disk is full.
        """
        if self.backbone is None:
            if parts:
                raise ConfigError(f"backbone: {PIXELS} have no {', '.join(parts)}")
            bank = self._extract(dataset, name, ())
        elif self.cache is None:
            bank = self._extract(dataset, name, parts)
        else:
            bank = self.cache.fetch(
                dataset, self._identity, parts, lambda wanted: self._extract(dataset, name, wanted)
            )
        for values in (bank.features, *bank.parts.values()):
            if not torch.isfinite(values).all():
                raise CheckpointError(
                    f"backbone: {self.description['source']} gives features that are not finite "
                    f"on the {name} images; its weights are damaged or its training diverged"
                )
        return bank

    @property
    def protocol(self) -> dict[str, Any]:
        """How images become features."""
        return {
            "image_size": list(self.size),
            "resize": self.resize,
            "interpolation": "bicubic",
            "precision": self.precision,
        }

    @property
    def _identity(self) -> dict[str, Any]:
        kept = ("sha256", "architecture", "model_args", "mean", "std")
        return self.protocol | {key: self.description[key] for key in kept}

    def _extract(self, dataset: ImageDataset, name: str, parts: Sequence[str]) -> FeatureBank:
        share = -(-len(dataset) // world_size())
        # on a terminal only, and from the main process
        hidden = None if is_main_process() else True
        with tqdm(total=share, desc=name, unit="image", disable=hidden, leave=False) as bar:
            if self.backbone is None:
                return pixel_features(
                    dataset,
                    size=self.size,
                    resize=self.resize,
                    channels=self.channels,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    on_batch=bar.update,
                )
            return extract_features(
                self.backbone,
                dataset,
                size=self.size,
                resize=self.resize,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                device=self.device,
                precision=self.precision,
                parts=parts,
                on_batch=bar.update,
            )


def open_subject(settings: FeatureSettings, device: torch.device) -> Subject:
    """Load what `settings` names. Raises UserError."""
    backbone = None
    description: dict[str, Any] = {"source": settings.backbone}
    if settings.backbone == PIXELS:
        size = as_size(settings.image_size or _PIXEL_SIZE)
        precision = "fp32"
    else:
        backbone, more = open_backbone(settings, device)
        size = backbone.img_size
        precision = choose_precision(settings.precision, device)
        description |= more
    return Subject(
        backbone=backbone,
        channels=3 if backbone is None else backbone.in_chans,
        size=size,
        resize=settings.resize or default_resize(size),
        batch_size=settings.batch_size,
        num_workers=loader_processes(settings.num_workers, processes_here()),
        device=device,
        precision=precision,
        description=description,
        cache=open_cache(settings),
    )


def open_backbone(
    settings: SourceSettings, device: torch.device
) -> tuple[Backbone, dict[str, Any]]:
    """The network of `settings`, and what a result says about it. Raises UserError."""
    if settings.backbone == PIXELS:
        raise ConfigError("backbone: pixels are no network, and this command needs one")
    backbone = load_backbone(
        settings.backbone, branch=settings.branch, img_size=settings.image_size, device=device
    )
    description = {
        "source": settings.backbone,
        "branch": settings.branch,
        "architecture": backbone.name,
        "model_args": backbone.model_args,
        "embed_dim": backbone.embed_dim,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "sha256": backbone_hash(backbone),
        "notes": backbone.notes,
    }
    return backbone, description


def open_cache(settings: FeatureSettings) -> FeatureCache | None:
    """The folder that keeps features, None for none. Raises ConfigError when it is a file."""
    folder = cache_folder(settings.cache, "features")
    if folder is None:
        return None
    return FeatureCache(folder, limit_gb=settings.cache_limit)


def open_images(settings: FeatureSettings, name: str, channels: int) -> ImageDataset:
    """The dataset of the setting `name`. Raises UserError."""
    spec = getattr(settings, name)
    return make_dataset(spec, channels=channels, download=settings.download, where=name)
