"""Which code computes a network's attention and linear layers: the same numbers for less time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from dino_kd import products
from dino_kd.models.backbone import Backbone
from dino_kd.models.fused_mlp import MLP, FusedMlp
from dino_kd.models.plain_attention import ATTENTION, PlainAttention
from dino_kd.products import LINEAR


def choose_kernels(network: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """The fastest for a device and the type of its matrix products, in place.

    Attention: on a CPU in bf16 plain matrix products beat PyTorch's fused attention (1.3 to 1.65
    times for a whole training step), timm's own by `plain_attention`; everywhere else every module
    that offers the fused one uses it. Linear layers: on a CPU by `products.linear`, where that is
    faster; MLPs in bf16 there by `FusedMlp`.
    """
    is_plain = device_type == "cpu" and dtype == torch.bfloat16
    by_onednn = device_type == "cpu" and products.is_faster(dtype)
    for module in network.modules():
        if isinstance(module, Backbone):
            for name in module.fusable:
                module.net.get_submodule(name).fused_attn = not is_plain  # type: ignore[assignment]
        elif type(module) in LINEAR:
            module.__class__ = products.Linear if by_onednn else nn.Linear
        elif type(module) in ATTENTION:
            module.__class__ = PlainAttention if is_plain else Attention
        elif type(module) in MLP:
            module.__class__ = FusedMlp if is_plain and by_onednn else Mlp


@contextlib.contextmanager
def kernels_for(network: nn.Module, device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """`choose_kernels` for a while; what was chosen before comes back."""
    fused = [(m, m.fused_attn) for m in network.modules() if hasattr(m, "fused_attn")]
    kinds = [(m, type(m)) for m in network.modules() if type(m) in (*LINEAR, *ATTENTION, *MLP)]
    choose_kernels(network, device_type, dtype)
    try:
        yield
    finally:
        for module, was_fused in fused:
            module.fused_attn = was_fused  # type: ignore[assignment]
        for module, kind in kinds:
            module.__class__ = kind
