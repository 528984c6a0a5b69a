"""Attention maps of one ViT block, for looking and for comparing with object masks.

timm's attention is fused, so no softmax tensor exists anywhere: the probabilities of the one block
that is asked for are recomputed from its input. The mass threshold follows the DINO paper, fig. 1.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dino_kd.errors import UserError
from dino_kd.models.backbone import Backbone


@torch.no_grad()
def attention_maps(backbone: Backbone, x: Tensor, block: int = -1) -> Tensor:
    """Softmax probabilities of one block, prefix tokens included.

    Args:
        backbone: a ViT with timm's standard attention.
        x: normalised images ``[N, C, H, W]``.
        block: which block; -1 is the last.

    Returns:
        ``[N, heads, T, T]`` float32, rows sum to 1; T = prefix tokens + patches.

    Raises:
        UserError: the network is a CNN, has another kind of attention, or has no such block.
    """
    attention = _attention_module(backbone, block)
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    handle = attention.register_forward_pre_hook(keep_input)
    try:
        backbone.net.forward_features(x)
    finally:
        handle.remove()
    tokens = inputs[0]  # [N, T, D]
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1))  # [N, T, 3, heads, d]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, T, d]
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = (q.float() * attention.scale) @ k.float().transpose(-2, -1)
    return scores.softmax(dim=-1)


def cls_attention(backbone: Backbone, x: Tensor, block: int = -1) -> Tensor:
    """How much the class token looks at each patch: ``[N, heads, rows, columns]``.

    Probabilities; with the share that goes to prefix tokens they sum to 1. Raises UserError for
    networks without class token and where `attention_maps` does.
    """
    attention = attention_maps(backbone, x, block)
    if getattr(backbone.net, "cls_token", None) is None:
        raise UserError(f"{backbone.name} has no class token whose attention could be shown")
    assert backbone.patch_size is not None  # a ViT, or attention_maps would have raised
    grid = (x.shape[-2] // backbone.patch_size, x.shape[-1] // backbone.patch_size)
    return attention[:, :, 0, backbone.num_prefix_tokens :].unflatten(-1, grid)


def threshold_mass(attention: Tensor, keep: float = 0.6) -> Tensor:
    """The smallest set of patches that holds the share `keep` of the attention.

    Args:
        attention: non-negative ``[..., P]``; need not sum to 1.
        keep: share in 0..1.

    Returns:
        bool ``[..., P]``.
    """
    ordered, order = attention.float().sort(dim=-1, descending=True, stable=True)
    total = ordered.sum(dim=-1, keepdim=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    chosen = mass_before < keep * total
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def _attention_module(backbone: Backbone, block: int) -> Attention:
    blocks = getattr(backbone.net, "blocks", None)
    if not backbone.is_vit or blocks is None:
        raise UserError(f"{backbone.name} is no ViT: it has no attention between patches to show")
    if not -len(blocks) <= block < len(blocks):
        raise UserError(f"{backbone.name} has blocks 0 to {len(blocks) - 1}, got {block}")
    attention = getattr(blocks[block], "attn", None)
    if not isinstance(attention, Attention):
        raise UserError(
            f"{backbone.name} computes attention in its own way ({type(attention).__name__}); "
            "maps are available for networks with timm's standard attention"
        )
    return attention
