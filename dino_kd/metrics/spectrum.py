"""Label-free quality of features: how many directions they use, how evenly, and what views do.

Computed in float64 on the CPU, whatever comes in. Features that are all equal give finite numbers,
never NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RANKME_EPSILON = 1e-7  # of the paper, for features in single precision
LIDAR_DELTA = 1e-4
ALPHA_RANKS = (3, 100)  # first and last rank of the fit
# Variance below this share of the mean square is rounding of single precision, not spread.
_NOISE = 1e-12


@torch.no_grad()
def rankme(features: Tensor, epsilon: float = RANKME_EPSILON) -> float:
    """Smooth rank of features ``[N, D]``, not centred: RankMe (arXiv 2210.02885, equation 1).

        p_k = s_k / sum(s) + epsilon,  s the singular values;  exp(-sum_k p_k ln p_k)

    Between 1 (all on one line through the origin) and min(N, D), up to `epsilon`. All zeros: 1.
    """
    singular = torch.linalg.svdvals(_double(features))
    return _smooth_rank(singular, epsilon)


@torch.no_grad()
def covariance_spectrum(features: Tensor) -> Tensor:
    """Eigenvalues of the covariance (over N) of ``[N, D]``: float64, descending, min(N, D) long.

    What is rounding of single precision (below 1e-12 of the mean square feature) is set to 0.
    """
    values = _double(features)
    centred = values - values.mean(0)
    spectrum = torch.linalg.svdvals(centred).square() / len(values)
    return torch.where(spectrum > _noise(values), spectrum, 0.0)


def alpha_req(spectrum: Tensor, ranks: tuple[int, int] = ALPHA_RANKS) -> float:
    """Decay exponent of a covariance spectrum: lambda_r ~ r^-alpha (arXiv 2202.05808).

    Least squares of ln(lambda) over ln(r), a point at rank r weighing 1/r, so that every octave
    counts alike; ranks `ranks` (from 1, both included), as far as eigenvalues are above 0, from
    rank 1 when fewer than two are left. 0.0 when fewer than two eigenvalues are above 0 at all.
    The paper finds good features near 1; a larger alpha means that fewer directions matter.
    """
    values = spectrum.double()[spectrum > 0]
    last = min(ranks[1], len(values))
    first = ranks[0] if last - ranks[0] >= 1 else 1
    if last - first < 1:
        return 0.0
    rank = torch.arange(first, last + 1, dtype=torch.float64)
    weight = 1 / rank
    x, y = rank.log(), values[first - 1 : last].log()
    x = x - (weight * x).sum() / weight.sum()
    return -((weight * x * y).sum() / (weight * x * x).sum()).item()


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of a covariance spectrum's shares (Roy & Vetterli 2007).

    From 1 to the number of directions; 0.0 when there is no variance.
    """
    total = spectrum.double().sum()
    if total == 0:
        return 0.0
    return torch.special.entr(spectrum.double() / total).sum().exp().item()


def participation_ratio(spectrum: Tensor) -> float:
    """(sum lambda)^2 / sum lambda^2: 1 to the number of directions, 0.0 without any variance."""
    values = spectrum.double()
    if values.sum() == 0:
        return 0.0
    return (values.sum().square() / values.square().sum()).item()


@torch.no_grad()
def alignment(views: Tensor) -> float:
    """Mean squared distance of two views of an image, on the sphere (Wang & Isola 2020, alpha 2).

        mean over images i and pairs q != r of || z_iq - z_ir ||^2,  z normalised

    Args:
        views: ``[N, Q, D]``, Q views of each image.

    Returns:
        0 (views agree) to 4. Lower is better, at equal uniformity.

    Raises:
        ValueError: fewer than two views.
    """
    if views.shape[1] < 2:
        raise ValueError(f"alignment needs at least 2 views of an image, got {views.shape[1]}")
    z = F.normalize(views.detach().cpu().double(), dim=-1)  # [N, Q, D]
    q = z.shape[1]
    # sum over all ordered pairs: 2 Q sum |z|^2 - 2 |sum z|^2
    total = 2 * q * z.square().sum((1, 2)) - 2 * z.sum(1).square().sum(1)  # [N]
    return max(0.0, (total / (q * (q - 1))).mean().item())


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2.0, *, chunk: int = 1024) -> float:
    """How evenly ``[N, D]`` fill the sphere (Wang & Isola 2020, section 4.1.2). Lower is better.

        ln mean over pairs i < j of exp(-t || z_i - z_j ||^2),  z normalised

    Working memory is ``8 * chunk * N`` bytes.

    Returns:
        0 when all point the same way, down to about -2 t for points spread evenly in many
        dimensions.

    Raises:
        ValueError: fewer than two features.
    """
    if len(features) < 2:
        raise ValueError(f"uniformity needs at least 2 images, got {len(features)}")
    z = F.normalize(_double(features), dim=-1)
    total = 0.0
    for start in range(0, len(z), chunk):
        rows = z[start : start + chunk]
        total += (-t * (2 - 2 * rows @ z.T).clamp_min(0)).exp().sum().item()
    own = (-t * (2 - 2 * z.square().sum(1)).clamp_min(0)).exp().sum().item()  # the diagonal
    return math.log(max((total - own) / (len(z) * (len(z) - 1)), 1e-300))


@torch.no_grad()
def lidar(views: Tensor, delta: float = LIDAR_DELTA, epsilon: float = RANKME_EPSILON) -> float:
    """Smooth rank of the LDA matrix whose classes are images: LiDAR (arXiv 2312.04000, section 4).

        Sb = mean_i (m_i - m)(m_i - m)^T,  Sw = mean_iq (e_iq - m_i)(e_iq - m_i)^T + delta I
        exp(-sum p ln p),  p = lambda / sum(lambda) + epsilon,  lambda of Sw^-1/2 Sb Sw^-1/2

    with m_i the mean of the views of image i and m the mean of those.

    Args:
        views: ``[N, Q, D]``, Q augmented views of each of N images.
        delta: added to the diagonal of Sw.
        epsilon: as in `rankme`.

    Returns:
        1 to min(N - 1, D); 1.0 when all images have the same mean.

    Raises:
        ValueError: fewer than two images or two views.
    """
    if views.shape[0] < 2 or views.shape[1] < 2:
        raise ValueError(
            f"LiDAR needs at least 2 images of 2 views, got {views.shape[0]} of {views.shape[1]}"
        )
    values = views.detach().cpu().double()
    means = values.mean(1)  # [N, D]
    within = (values - means[:, None]).flatten(0, 1)  # [N * Q, D]
    scatter = within.T @ within / len(within)
    scatter.diagonal().add_(delta)
    between = means - means.mean(0)
    # Sw^-1/2 Sb Sw^-1/2 and L^-1 Sb L^-T of a Cholesky factor have the same eigenvalues: the
    # squared singular values of L^-1 (m_i - m) / sqrt(N).
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(scatter), between.T, upper=False
    )  # [D, N]
    eigenvalues = torch.linalg.svdvals(whitened).square() / len(means)
    if between.square().mean() <= _noise(means):
        return 1.0
    return _smooth_rank(eigenvalues, epsilon)


def mean_std(features: Tensor) -> float:
    """Mean over dimensions of the deviation of ``[N, D]`` features, each of length 1.

    1/sqrt(D) is the largest, for features spread evenly around 0; 0 means a constant feature.
    """
    return F.normalize(_double(features), dim=-1).std(0, correction=0).mean().item()


def dead_dimensions(features: Tensor, share: float = 1e-3) -> float:
    """Share 0..1 of the dimensions of ``[N, D]`` that hardly move.

    A dimension is dead when its deviation is below `share` of the root mean square of all
    deviations, or is rounding.
    """
    values = _double(features)
    variance = values.var(0, correction=0)  # [D]
    limit = max(share**2 * variance.mean().item(), _noise(values))
    return (variance <= limit).double().mean().item()


def _smooth_rank(values: Tensor, epsilon: float) -> float:
    """exp of the entropy of the shares of `values`, all >= 0; 1.0 for zeros."""
    total = values.sum()
    if total == 0:
        return 1.0
    shares = values / total + epsilon
    return torch.special.entr(shares).sum().exp().item()


def _double(features: Tensor) -> Tensor:
    return features.detach().cpu().double()


def _noise(values: Tensor) -> float:
    return _NOISE * values.square().mean().item()
