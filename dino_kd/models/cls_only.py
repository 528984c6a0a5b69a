"""The class token of a vision transformer without the last block's work on every other token.

What a DINO loss or a k-NN reads of a ViT is one row, the class token after the last norm. In the
last block only that row needs a query, an attention output and an MLP; the other tokens matter as
keys and values alone, and even those are never formed. With one query ``q`` a head

    scores = q . (W_k x + b_k) = (W_k^T q) . x + a constant, which the softmax removes
    output = sum_t a_t (W_v x_t + b_v) = W_v (sum_t a_t x_t) + b_v, as probabilities sum to 1

so that two products of [heads, D] with [D, T] stand for two of [T, D] with [D, D]. Exact, and
about 8 % of a ViT's products; networks that are built differently are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, GluMlp, SwiGLU
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dino_kd.models.fused_mlp import MLP
from dino_kd.models.plain_attention import ATTENTION
from dino_kd.models.watched import called_as, is_watched, unsharded_class
from dino_kd.products import LINEAR

ROWS_READ = {VisionTransformer: 1, VisionTransformerDistilled: 2}  # by the output
# A version of timm that has more parts than these computes something that is not known here.
_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop", "gate"}


def fits(net: Any) -> bool:
    """Whether `class_feature` gives what ``net(x)`` gives, as far as anybody could tell.

    True for timm's plain ViT that pools by its class token, with standard blocks. False with
    hooks on what would be passed by, and while dropout draws a number for every token.
    """
    if not reads_class_token(net) or not is_standard(net.blocks[-1]):
        return False
    passed = [net, net.blocks, net.norm, *net.blocks[-1].modules()]
    return not any(is_watched(module) or mixes_rows(module) for module in passed)


def class_feature(net: Any, x: Tensor) -> Tensor:
    """What ``net(x)`` returns, ``[N, D]``, for normalised images ``[N, C, H, W]``; `net` `fits`.

    Stochastic depth draws the same numbers as in ``net(x)``.
    """
    tokens = embed(net, x)  # [N, T, D]
    before = net.blocks[:-1]
    if net.grad_checkpointing and len(before):
        tokens = checkpoint_seq(before, tokens)
    else:
        for block in before:
            tokens = block(tokens)
    rows = called_as(_first_rows, net.blocks[-1], tokens, ROWS_READ[type(net)])
    return net.forward_head(net.norm(rows))


def embed(net: Any, x: Tensor) -> Tensor:
    """What the first block is given for images ``[N, C, H, W]``: ``[N, T, D]``."""
    return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))


def _first_rows(block: Any, x: Tensor, rows: int) -> Tensor:
    """The first `rows` tokens that a block makes of all tokens ``[N, T, D]``: ``[N, rows, D]``."""
    looked = attend(block.attn, block.norm1(x), rows)  # [N, rows, D]
    first = x[:, :rows] + block.drop_path1(block.ls1(looked))
    return first + block.drop_path2(block.ls2(block.mlp(block.norm2(first))))


def attend(attention: Any, x: Tensor, rows: int) -> Tensor:
    """The attention output of the first `rows` of ``[N, T, D]``: ``[N, rows, D]``."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for three products
    heads = attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query, key, value = weight.chunk(3)  # each [heads * d, D]
    parts = (None, None, None) if bias is None else bias.chunk(3)
    q = F.linear(x[:, :rows], query, parts[0]).unflatten(-1, (heads, -1))  # [N, rows, heads, d]
    q = attention.q_norm(q) * attention.scale
    if isinstance(attention.k_norm, nn.Identity):
        per_head = torch.einsum("nrhd,hdc->nrhc", q, key.unflatten(0, (heads, -1)))
        scores = per_head.flatten(1, 2) @ x.transpose(1, 2)  # [N, rows * heads, T]
    else:
        k = attention.k_norm(F.linear(x, key, parts[1]).unflatten(-1, (heads, -1)))
        scores = torch.einsum("nrhd,nthd->nrht", q, k).flatten(1, 2)
    seen = (scores.softmax(-1).to(x.dtype) @ x).unflatten(1, (rows, heads))  # [N, rows, heads, D]
    out = torch.einsum("nrhc,hdc->nrhd", seen, value.unflatten(0, (heads, -1))).flatten(-2)
    if parts[2] is not None:
        out = out + parts[2]
    if hasattr(attention, "norm"):
        out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(x[:, :rows]).sigmoid()
    return attention.proj(out)


def reads_class_token(net: Any) -> bool:
    """timm's plain ViT with blocks, which pools by its class token."""
    if type(net) not in ROWS_READ or not len(net.blocks):
        return False
    return net.global_pool == "token" and net.attn_pool is None and net.cls_token is not None


def is_standard(block: Any) -> bool:
    """timm's block, of parts that all are known here."""
    if unsharded_class(block) is not Block or not _has_parts(block, _BLOCK):
        return False
    if type(block.attn) not in ATTENTION or not _has_parts(block.attn, _ATTENTION):
        return False
    if not {type(block.drop_path1), type(block.drop_path2)} <= {nn.Identity, DropPath}:
        return False
    return type(block.mlp) in (*MLP, GluMlp, SwiGLU) and type(block.attn.qkv) in LINEAR


def _has_parts(module: nn.Module, known: set[str]) -> bool:
    return {name for name, _ in module.named_children()} <= known


def mixes_rows(module: nn.Module) -> bool:
    """Its result for one token depends on how many there are, or draws numbers for each."""
    draws = isinstance(module, nn.Dropout) and module.training and module.p > 0
    return draws or isinstance(module, _BatchNorm)
