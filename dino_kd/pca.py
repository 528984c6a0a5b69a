"""Principal components of patch tokens, so that what a backbone tells apart has a colour.

The picture follows the DINOv2 paper (Oquab et al. 2023, fig. 1): one fit over the patches of all
shown images, so that equal colours mean equal features in every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Foreground = Literal["all", "positive", "negative"]
_COLOURS = 3  # red, green, blue
_OUTLIERS = 0.01  # share of patches at either end that share the strongest colour
_NOTHING = 1e-12  # a component below this share of the variance is rounding
_BACKGROUND = 0.0  # black


@dataclass(frozen=True)
class Pca:
    """Directions of largest variance, float64.

    Attributes:
        mean: ``[D]``.
        components: ``[count, D]``, orthonormal, largest variance first; rows of zeros where the
            tokens vary in fewer directions. In each the entry of largest size is positive.
        variance_share: ``[count]``, 0..1.
    """

    mean: Tensor
    components: Tensor
    variance_share: Tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Coordinates float64 ``[..., count]`` of tokens ``[..., D]``."""
        return (tokens.double() - self.mean) @ self.components.T


@dataclass(frozen=True)
class PatchColours:
    """A fitted map from patch tokens to colours. Build it with `fit_patch_colours`.

    Attributes:
        pca: three components of all tokens, or of the foreground's.
        low, high: ``[3]``, the coordinates that become 0 and 1.
        separation: the PCA whose first component tells object from background, if any.
        foreground: which sign of it is the object.
    """

    pca: Pca
    low: Tensor
    high: Tensor
    separation: Pca | None
    foreground: Foreground

    def __call__(self, tokens: Tensor) -> Tensor:
        """Red, green, blue in 0..1, float32 ``[..., 3]``, of tokens ``[..., D]``.

        A component without spread is 0.5; the background is black.
        """
        span = self.high - self.low
        scaled = (self.pca.project(tokens) - self.low) / span.clamp(min=torch.finfo(span.dtype).eps)
        colours = torch.where(span > 0, scaled.clamp(0, 1), 0.5).float()
        if self.separation is None:
            return colours
        shown = _object(self.separation, tokens, self.foreground)[..., None]
        return colours.masked_fill(~shown, _BACKGROUND)


def fit_pca(tokens: Tensor, count: int = _COLOURS) -> Pca:
    """The first components of tokens ``[M, D]``, M >= 1, in float64.

    By the eigenvectors of the smaller of covariance and Gram matrix. Signs are fixed: in each
    component the entry of largest size is positive, as in scikit-learn.
    """
    values = tokens.double()
    mean = values.mean(0)
    centred = values - mean  # [M, D]
    rows, width = centred.shape
    if rows >= width:
        variance, vectors = torch.linalg.eigh(centred.T @ centred)
        vectors = vectors.T  # [D, D], ascending
    else:
        variance, sides = torch.linalg.eigh(centred @ centred.T)
        vectors = torch.nn.functional.normalize(sides.T @ centred, dim=-1)  # [M, D], ascending
    variance = variance.clamp(min=0).flip(0)[:count]
    vectors = vectors.flip(0)[:count]
    total = centred.square().sum()
    # relative to the values themselves: equal tokens differ by the rounding of their mean
    real = variance > _NOTHING * max(total, values.square().sum())
    components = torch.zeros(count, width, dtype=torch.float64, device=tokens.device)
    components[: len(vectors)] = vectors * real[:, None]
    largest = components.abs().argmax(1, keepdim=True)
    components *= components.gather(1, largest).sign()
    share = torch.zeros(count, dtype=torch.float64, device=tokens.device)
    share[: len(vectors)] = variance * real / total.clamp(min=torch.finfo(total.dtype).tiny)
    return Pca(mean, components, share)


def fit_patch_colours(tokens: Tensor, foreground: Foreground = "all") -> PatchColours:
    """Fit colours to the patches ``[M, D]`` of all images that are shown.

    Args:
        tokens: patch tokens.
        foreground: "all": every patch. "positive", "negative": only patches with this sign of the
            first component, which the colours are then fitted to again; which of the two is the
            object depends on the network. Falls back to "all" when fewer than two patches have it.
    """
    separation, kept = None, tokens
    if foreground != "all":
        separation = fit_pca(tokens)
        kept = tokens[_object(separation, tokens, foreground)]
        if len(kept) < 2:
            separation, kept, foreground = None, tokens, "all"
    pca = fit_pca(kept)
    ordered = pca.project(kept).sort(dim=0).values  # [M, 3]
    last = len(ordered) - 1
    cut = int(_OUTLIERS * last)
    return PatchColours(pca, ordered[cut], ordered[last - cut], separation, foreground)


def _object(separation: Pca, tokens: Tensor, foreground: Foreground) -> Tensor:
    first = separation.project(tokens)[..., 0]
    return first > 0 if foreground == "positive" else first < 0
