"""A network without what the library does for speed alone: the other side of a comparison."""

from __future__ import annotations

import torch
from torch import nn

from dino_kd.models.kernels import choose_kernels


def plain_kernels(network: nn.Module) -> None:
    """Attention as softmax(q k) v by timm's own code, linear layers by torch's; in place."""
    choose_kernels(network, "cuda", torch.float32)  # none of those for a CPU
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
