"""The DINO projection head (Caron et al. 2021, section 3.3 and appendix C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd.models.unit_rows import unit_rows
from dino_kd.products import linear

_EPS = 1e-6  # far below any real length, far above float32's rounding near zero


class DINOHead(nn.Module):
    """MLP, L2-normalised bottleneck, and one logit per prototype.

        z = mlp(x) / |mlp(x)|                                [N, bottleneck_dim]
        logits[n, k] = lengths[k] * z[n] . last_layer[k] / |last_layer[k]|

    With `unit_prototypes` all lengths are 1 and logits are cosines in -1..1. The normalisation is
    written out instead of `nn.utils.weight_norm`, whose hooks cannot be deep-copied.

    Args:
        in_dim: width D of the backbone's features.
        num_prototypes: output width K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the normalised layer.
        num_layers: linear layers before the prototypes; 3: in -> hidden -> hidden -> bottleneck,
            1: in -> bottleneck.
        batch_norm: batch norm after each hidden linear layer.
        unit_prototypes: keep prototypes at length 1 (`norm_last_layer` of the paper's code).
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        unit_prototypes: bool = True,
    ) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            if i < num_layers - 1:
                if batch_norm:
                    layers.append(nn.BatchNorm1d(widths[i + 1]))
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        # One dimension, so that weight decay leaves it alone like every other scale.
        self.lengths = None if unit_prototypes else nn.Parameter(torch.ones(num_prototypes))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.last_layer, std=0.02)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """Features ``[N, D]`` to logits ``[N, K]``.

        Lengths are computed in float32 under autocast too; only the products are low precision.
        `frozen`: `prototype_parameters` get no gradient, and none is computed; a third of the
        products of this layer.
        """
        z = F.normalize(self.mlp(x).float(), dim=-1, eps=_EPS)  # [N, bottleneck_dim]
        if frozen:
            with torch.no_grad():
                prototypes = self._prototypes()
            return _Unmoved.apply(linear(z, prototypes), *self.prototype_parameters())
        return linear(z, self._prototypes())

    def _prototypes(self) -> Tensor:
        if self.lengths is not None:
            return unit_rows(self.last_layer, _EPS, torch.float32) * self.lengths[:, None]
        device = self.last_layer.device.type
        low = torch.is_autocast_enabled(device)  # what the product is taken in
        dtype = torch.get_autocast_dtype(device) if low else torch.float32
        return unit_rows(self.last_layer, _EPS, dtype)  # [K, bottleneck_dim]

    def prototype_parameters(self) -> list[nn.Parameter]:
        """What stays fixed while the last layer is frozen."""
        return [self.last_layer] if self.lengths is None else [self.last_layer, self.lengths]


class _Unmoved(torch.autograd.Function):
    """Its first input; the others count as used and get no gradient.

    DistributedDataParallel waits for every parameter of the graph, and would wait forever for one
    that is not in it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.num_parameters
