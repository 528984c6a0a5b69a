"""One vector per image for retrieval: class token, GeM-pooled patches, several scales, whitening.

As DINO's evaluations of retrieval and copy detection use them (arXiv 2104.14294, sections 4.2.1 and
appendix); GeM is Radenovic et al. 2018 (arXiv 1711.02512), equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd.models.backbone import Backbone

DINO_SCALES = (1.0, 1 / math.sqrt(2), 0.5)
_GEM_FLOOR = 1e-6
_VARIANCE_FLOOR = 1e-5  # of the largest; directions without variance would blow up


def gem(patches: Tensor, power: float) -> Tensor:
    """Generalised mean over the patches, ``[N, P, D]`` to ``[N, D]``.

    ``(mean over p of max(x_p, 1e-6)^power)^(1/power)``: the mean for power 1 (of what is positive),
    the maximum for a large one. In float32, where high powers keep their digits.
    """
    x = patches.float().clamp(min=_GEM_FLOOR)
    top = x.amax(1, keepdim=True)  # no power overflows or vanishes relative to the largest
    return (top * (x / top).pow(power).mean(1, keepdim=True).pow(1 / power)).squeeze(1)


def describe(
    backbone: Backbone,
    images: Tensor,
    *,
    parts: Sequence[str] = ("cls",),
    gem_power: float = 4.0,
    scales: Sequence[float] = (1.0,),
    multiple: int | None = None,
) -> Tensor:
    """Descriptors ``[N, D]`` (not normalised) of normalised images ``[N, C, H, W]``.

    Args:
        backbone: in eval mode.
        images: sides that are multiples of the patch.
        parts: "cls" (the network's own output) and "gem", concatenated in this order.
        gem_power: exponent of "gem".
        scales: factors; the descriptors of all scales are averaged. Scaled images are resized
            bilinearly and lose the rows below and columns right of the last whole `multiple`.
        multiple: of pixels that sides need; None: the patch, 1 without patches.
    """
    multiple = multiple or backbone.patch_size or 1
    total: Tensor | None = None
    for scale in scales:
        view = images if scale == 1 else _scaled(images, scale, multiple)
        if tuple(parts) == ("cls",):
            found = backbone(view).float()
        else:
            tokens = backbone.tokens(view)
            made = {"cls": tokens.cls.float(), "gem": gem(tokens.patches, gem_power)}
            found = torch.cat([made[part] for part in parts], dim=1)
        total = found if total is None else total + found
    assert total is not None  # there is a scale
    return total / len(scales)


@dataclass(frozen=True)
class Whitening:
    """Principal axes scaled to unit variance.

    Attributes:
        mean: float32 ``[D]``.
        matrix: float32 ``[D, D]``; one column for each axis, the largest variance first.
    """

    mean: Tensor
    matrix: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Whitened features ``[N, D]``."""
        return (features - self.mean) @ self.matrix


def learn_whitening(features: Tensor) -> Whitening:
    """PCA whitening from features ``[N, D]``, N >= 2.

    Variances below 1e-5 of the largest count as that much: with fewer images than dimensions the
    rest of the space has none, and would be amplified without bound.
    """
    x = features.double()
    mean = x.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(x.T))  # ascending
    variance, axes = variance.flip(0), axes.flip(1)
    floor = variance[0].clamp(min=1e-30) * _VARIANCE_FLOOR
    matrix = axes / variance.clamp(min=floor).sqrt()
    return Whitening(mean.float(), matrix.float())


def _scaled(images: Tensor, scale: float, multiple: int) -> Tensor:
    height, width = (max(multiple, int(side * scale)) for side in images.shape[-2:])
    small = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    return small[..., : height - height % multiple, : width - width % multiple]
