"""Supervised classification as a Task: a backbone and a linear classifier, trained together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dino_kd.data.loader import CropBatch
from dino_kd.models.backbone import Backbone
from dino_kd.models.batch_norm import BatchNormStatistics
from dino_kd.models.layers import layer_scales

_CLASSIFIER_STD = 2e-5  # MAE's fine-tuning: near zero, so that the first steps spare the features


@dataclass
class LabelledImages:
    """A batch whose labels go where its images go.

    Attributes:
        images: uint8 ``[B, C, H, W]``.
        labels: int64 ``[B]``.
    """

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: CropBatch, labels: Tensor) -> LabelledImages:
        """The single global crop of every image, and its label from all `labels` ``[N]``.

        An image that stands in for a broken one brings its own label.
        """
        (images,) = batch.crops.global_crops
        return cls(images, labels[batch.indices])

    def to(self, device: torch.device) -> LabelledImages:
        """The same batch on `device`."""
        return LabelledImages(
            self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        )

    def chunk(self, n: int) -> list[LabelledImages]:
        """Split into `n` equal parts, as views. Raises ValueError if B % n != 0."""
        count = len(self.labels)
        if n < 1 or count % n:
            raise ValueError(f"{count} images cannot be split into {n} equal parts")
        parts = zip(self.images.split(count // n), self.labels.split(count // n), strict=True)
        return [LabelledImages(images, labels) for images, labels in parts]


class Mixing(nn.Module):
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch, or neither.

    Draws from torch's global generator. Every image is mixed with its neighbour in the batch, all
    by one share; one of the two is chosen at even odds when both are on.

    Args:
        num_classes: Y.
        mixup, cutmix: parameter of the Beta distribution of the share; 0: off.
        share: of the batches that are mixed.
    """

    def __init__(self, num_classes: int, *, mixup: float, cutmix: float, share: float) -> None:
        super().__init__()
        self.num_classes, self.share = num_classes, share
        makers = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.kinds = [make(alpha=alpha, num_classes=num_classes) for make, alpha in makers if alpha]

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[N, C, H, W]`` and labels ``[N]`` to images and class shares ``[N, Y]``."""
        if self.kinds and torch.rand(()) < self.share:
            kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
            return kind(images, labels)
        return images, F.one_hot(labels, self.num_classes).float()


class ClassifyTask(nn.Module):
    """A backbone learns to name classes, with a linear classifier on its output.

    Args:
        backbone: trained from the state it comes in.
        num_classes: Y.
        label_smoothing: share of the target that is spread over all classes.
        mixing: changes images and labels of training batches.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=_CLASSIFIER_STD)
        nn.init.zeros_(self.classifier.bias)
        self.label_smoothing = label_smoothing
        self.mixing = mixing
        self._statistics = BatchNormStatistics(self)
        self.train()

    def forward(
        self, batch: LabelledImages, values: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with the smoothed, mixed target of one micro-batch.

            target = (1 - s) * shares + s / Y;  loss = -mean over n of sum_y target * log p

        ``batch_top1`` is the share of images, in percent, whose best class is the one that has the
        larger share of the target.
        """
        self._statistics.remember()
        images = self.backbone.preprocess(batch.images)  # [N, C, H, W]
        if self.mixing is not None:
            images, target = self.mixing(images, batch.labels)  # [N, Y]
        else:
            target = F.one_hot(batch.labels, self.classifier.out_features).float()
        logits = self.classifier(self.backbone(images))  # [N, Y]
        loss = F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
        if not values.get("measure"):
            return loss, {}
        hits = logits.detach().argmax(1) == target.argmax(1)
        return loss, {"batch_top1": 100 * hits.float().mean()}

    def after_step(self, values: dict[str, float], skipped: bool) -> None:
        """Batch-norm statistics: undo a skipped step, else take the mean over processes."""
        self._statistics.settle(skipped)

    def lr_scales(self, layer_decay: float) -> dict[str, float]:
        """The factor on the learning rate for every parameter name; 1 for the classifier."""
        inside = layer_scales(self.backbone, layer_decay)
        return {name: 1.0 for name, _ in self.named_parameters()} | {
            f"backbone.net.{name}": scale for name, scale in inside.items()
        }


@torch.no_grad()
def class_places(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the true one: 0 is a top-1 hit, below 5 a top-5 hit.

    Of equal logits the lower class stands first.

    Args:
        logits: finite, ``[N, Y]``.
        labels: int64 ``[N]`` in 0..Y-1.

    Returns:
        int64 ``[N]`` in 0..Y-1.
    """
    truth = logits.gather(1, labels[:, None])  # [N, 1]
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]  # [N, Y]
    return ((logits > truth) | ((logits == truth) & lower)).sum(1)
