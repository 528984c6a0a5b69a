"""A ViT's attention in bf16 on a CPU: plain matrix products, as one function with its own gradient.

PyTorch's fused attention is slow there, its backward pass above all. Left to the graph, plain
products copy queries, keys, values and each of their gradients into the order of the next product;
here they are put in order once for all heads, and once back. Rows of fewer scores than the
processor takes at a time (32) go through the softmax in float32, whose gradient is ten times as
fast for them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_kd.models.watched import is_watched

_AT_A_TIME = 32  # bf16 numbers in an AVX-512 register


def plain_attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """What each token sees: ``softmax(scale q k^T) v`` for every head (no second gradients).

    Args:
        qkv: ``[N, T, 3 * heads * d]``, as a ViT's linear layer gives queries, keys and values.
        heads: how many.
        scale: of the scores, ``1 / sqrt(d)``.

    Returns:
        ``[N, T, heads * d]``.
    """
    made: Tensor = _PlainAttention.apply(qkv, heads, scale)
    return made


class PlainAttention(Attention):
    """timm's attention by `plain_attention`; a module becomes one by its `__class__`."""

    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        """Tokens ``[N, T, D]`` to ``[N, T, D]``."""
        given = (*masks, *named_masks.values())
        if any(mask is not None and mask is not False for mask in given) or not self._is_plain():
            return super().forward(x, *masks, **named_masks)
        out = plain_attention(self.qkv(x), self.num_heads, self.scale)
        return self.proj_drop(self.proj(self.norm(out)))

    def _is_plain(self) -> bool:
        """Whether nothing happens between the linear layers but attention, and nobody listens."""
        if any(map(is_watched, (self.q_norm, self.k_norm, self.attn_drop))):
            return False
        drops = self.training and self.attn_drop.p > 0
        normed = not (type(self.q_norm) is type(self.k_norm) is nn.Identity)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return not (drops or normed or traced) and getattr(self, "gate", None) is None


ATTENTION = (Attention, PlainAttention)  # exactly these: others compute something else


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, scale: float) -> Tensor:
        ordered = _by_head(qkv, 3, heads)  # [3, N * heads, T, d]
        query, key, value = ordered.unbind()
        scores = query.new_empty(len(query), query.shape[1], key.shape[1])
        probabilities = _softmax(_multiply(query, key.transpose(1, 2), scale, scores))
        ctx.save_for_backward(ordered, probabilities)
        ctx.heads, ctx.scale = heads, scale
        return _by_token(torch.bmm(probabilities, value)[None], heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ordered, probabilities = ctx.saved_tensors
        query, key, value = ordered.unbind()
        (seen,) = _by_head(gradient, 1, ctx.heads).unbind()  # [N * heads, T, d]
        made = torch.empty_like(ordered)
        torch.bmm(probabilities.transpose(1, 2), seen, out=made[2])
        scores = _softmax_gradient(torch.bmm(seen, value.transpose(1, 2)), probabilities)
        _multiply(scores, key, ctx.scale, made[0])
        _multiply(scores.transpose(1, 2), query, ctx.scale, made[1])
        return _by_token(made, ctx.heads), None, None


def _by_head(x: Tensor, parts: int, heads: int) -> Tensor:
    """``[N, T, parts * heads * d]`` -> ``[parts, N * heads, T, d]``, a copy."""
    apart = x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)  # [parts, N, heads, T, d]
    return apart.clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _by_token(x: Tensor, heads: int) -> Tensor:
    """``[parts, N * heads, T, d]`` -> ``[N, T, parts * heads * d]``, a copy."""
    return x.unflatten(1, (-1, heads)).permute(1, 3, 0, 2, 4).flatten(2)


def _multiply(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """``scale * left @ right`` into `out`, scaled before it is rounded and without another pass."""
    return out.baddbmm_(left, right, beta=0, alpha=scale)  # 0: whatever `out` holds is not read


def _softmax(scores: Tensor) -> Tensor:
    if _is_short(scores):
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(-1)


def _softmax_gradient(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Of the scores, from that of the probabilities."""
    dtype = probabilities.dtype
    if _is_short(gradient):
        gradient, probabilities = gradient.float(), probabilities.float()
    made = torch._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)
    return made.to(dtype)


def _is_short(rows: Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and rows.shape[-1] < _AT_A_TIME
