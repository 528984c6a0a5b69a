"""Teacher features in standard units, so that a weight means the same for every teacher.

`Standardise` scales every column; `PhiS` (Ranzinger et al. 2024, 2410.01680) rotates the features
so that all columns have one variance under one common scale, and errors count alike in every
direction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_kd.hardware import widest
from dino_kd.losses.numerics import without_autocast

_CONSTANT = 1e-12  # a variance below this share of the mean square is rounding
_SEED = 2410  # of the rotation where no Hadamard matrix is known


class _Affine(nn.Module):
    """``y = ((x - mean) @ rotation) / scale`` and its inverse; the identity until fitted.

    The buffers are the same for all: one `state_dict` describes any of them.
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("rotation", torch.eye(dim))

    def forward(self, features: Tensor) -> Tensor:
        """Standard units, float32 ``[..., D]``, of features ``[..., D]``."""
        with without_autocast(features):
            return (features.float() - self.mean) @ self.rotation / self.scale

    def inverse(self, standard: Tensor) -> Tensor:
        """Features ``[..., D]`` of what `forward` gave."""
        with without_autocast(standard):
            return (standard.float() * self.scale) @ self.rotation.T + self.mean

    def _checked(self, features: Tensor) -> Tensor:
        dim = len(self.mean)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features must be [M, {dim}], got {list(features.shape)}")
        if len(features) < 2:
            raise ValueError(f"a variance needs at least 2 rows of features, got {len(features)}")
        values = widest(features.detach())
        if not values.isfinite().all():
            raise ValueError("features to be standardised must be finite")
        return values


class Standardise(_Affine):
    """Columns with mean 0 and variance 1."""

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Measure features ``[M, D]``, M >= 2, the same on every process.

        Variances are divided by M. A constant column is only centred. ValueError for other shapes
        or values that are not finite.
        """
        values = self._checked(features)
        variance, mean = torch.var_mean(values, 0, correction=0)
        varies = variance > _CONSTANT * values.square().mean(0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, variance.sqrt(), 1))


class PhiS(_Affine):
    """PHI-S: ``y = H U^T (x - mean) / phi`` with the covariance ``U L U^T``, ``phi^2 = mean(L)``.

    H is an orthonormal Hadamard matrix, so that every column of y has variance
    ``sum_j H_ij^2 L_j / phi^2 = 1`` and ``|y - y'|^2 = |x - x'|^2 / phi^2``. For a width without a
    matrix of `hadamard`, H is a random rotation of a fixed seed, and variances are only near 1.
    """

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Measure features ``[M, D]``, M >= 2, the same on every process, in float64.

        The covariance has D^2 entries: take M >= 20 D tokens for one that holds on others.
        ValueError for other shapes or values that are not finite.
        """
        values = self._checked(features)
        mean = values.mean(0)
        centred = values - mean
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(values))
        phi_squared = variances.clamp(min=0).mean()
        varies = phi_squared > _CONSTANT * values.square().mean()
        mixing = hadamard(len(mean))
        if mixing is None:
            mixing = _random_rotation(len(mean))
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, phi_squared.sqrt(), 1).expand_as(self.scale))
        self.rotation.copy_(vectors @ mixing.to(vectors.device).T)


def hadamard(order: int) -> Tensor | None:
    """An orthonormal matrix of entries ``+-1 / sqrt(order)``, float64; None where none is built.

    Sylvester's for powers of two; else the Kronecker product of Sylvester's of order 2^k with
    Paley's first of order q + 1, q a prime = 3 mod 4. That covers 96, 192, 320, 384, 576, 768,
    960, 1280, 1536.
    """
    power = 1
    while order % power == 0:
        rest = order // power
        if rest == 1 or (rest % 4 == 0 and _is_prime(rest - 1)):
            core = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else _paley(rest - 1)
            return torch.kron(_sylvester(power), core) / order**0.5
        power *= 2
    return None


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, pair)
    return matrix


def _paley(prime: int) -> Tensor:
    """Order prime + 1: I + S, S skew, bordered from the quadratic residues of differences."""
    numbers = torch.arange(prime)
    residue = -torch.ones(prime, dtype=torch.float64)
    residue[numbers.square() % prime] = 1
    residue[0] = 0
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:] = 1
    skew[1:, 0] = -1
    skew[1:, 1:] = residue[(numbers[None] - numbers[:, None]) % prime]
    return torch.eye(prime + 1, dtype=torch.float64) + skew


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _random_rotation(order: int) -> Tensor:
    """An orthogonal matrix, float64, the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randn(order, order, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draws).Q
