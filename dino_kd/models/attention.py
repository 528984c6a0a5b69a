"""Attention maps of one ViT block, for looking and for comparing with object masks.

timm's attention is fused, so no softmax tensor exists anywhere: the probabilities of the one block
that is asked for are recomputed from its input. The mass threshold follows the DINO paper, fig. 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dino_kd.errors import ConfigError, UserError
from dino_kd.models.backbone import Backbone, Tokens


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
    attention = attention_module(backbone, block)
    with kept_input(attention) as inputs:
        backbone.net.forward_features(x)
    return attention_probabilities(attention, inputs[0], None)


def cls_attention(backbone: Backbone, x: Tensor, block: int = -1) -> Tensor:
    """How much the class token looks at each patch: ``[N, heads, rows, columns]``.

    Probabilities; with the share that goes to prefix tokens they sum to 1. Raises UserError for
    networks without class token and where `attention_maps` does.
    """
    return cls_attention_and_tokens(backbone, x, block)[0]


@torch.no_grad()
def cls_attention_and_tokens(
    backbone: Backbone, x: Tensor, block: int = -1
) -> tuple[Tensor, Tokens]:
    """`cls_attention` and `Backbone.tokens` from one forward pass; memory grows with T, not T^2."""
    check_cls_attention(backbone, block)
    attention = attention_module(backbone, block)
    with kept_input(attention) as inputs:
        tokens = backbone.tokens(x)
    probabilities = attention_probabilities(attention, inputs[0], 1)[:, :, 0]  # [N, heads, T]
    return probabilities[:, :, backbone.num_prefix_tokens :].unflatten(-1, tokens.grid), tokens


def check_cls_attention(backbone: Backbone, block: int = -1) -> None:
    """Raise the UserError that `cls_attention` would, without running the network.

    It is a ConfigError only for a block that the network does not have.
    """
    attention_module(backbone, block)
    if getattr(backbone.net, "cls_token", None) is None:
        raise UserError(f"{backbone.name} has no class token whose attention could be shown")


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


@contextlib.contextmanager
def kept_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the first argument of every call of `module`."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        handle.remove()


def attention_probabilities(attention: Attention, tokens: Tensor, queries: int | None) -> Tensor:
    """Softmax rows ``[N, heads, queries, T]`` of the first `queries` tokens (None: all)."""
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1))  # [N, T, 3, heads, d]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, T, d]
    q, k = attention.q_norm(q[:, :, :queries]), attention.k_norm(k)
    scores = (q.float() * attention.scale) @ k.float().transpose(-2, -1)
    return scores.softmax(dim=-1)


def attention_module(backbone: Backbone, block: int) -> Attention:
    """The attention of one block; raises the UserErrors of `attention_maps`."""
    blocks = getattr(backbone.net, "blocks", None)
    if not backbone.is_vit or blocks is None:
        raise UserError(f"{backbone.name} is no ViT: it has no attention between patches to show")
    if not -len(blocks) <= block < len(blocks):
        raise ConfigError(
            f"block: {backbone.name} has blocks 0 to {len(blocks) - 1}, got {block}; -1 is the last"
        )
    attention = getattr(blocks[block], "attn", blocks[block])
    if not isinstance(attention, Attention):
        raise UserError(
            f"{backbone.name} computes attention in its own way ({type(attention).__name__}); "
            "maps are available for networks with timm's standard attention"
        )
    return attention
