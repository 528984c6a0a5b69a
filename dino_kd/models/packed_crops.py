"""Crops of different sizes through a vision transformer together, as one row of tokens.

Norms, linear layers and sums treat every token alike: one operation does for all crops where there
would be one for each group of one size. Attention alone looks at neighbours, and is computed group
by group. The idea is DINOv2's sequence packing (arXiv 2304.07193, section 5), which has a kernel
for that. The last block works on the class tokens alone, as in `cls_only`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd.errors import ConfigError
from dino_kd.models import cls_only
from dino_kd.models.compiled_blocks import after_attention, drops, is_compiled
from dino_kd.models.watched import is_watched

Shapes = tuple[tuple[int, int], ...]  # images N and tokens T of each group
Factor = Tensor | None  # of stochastic depth for every token or image; None: it is off


def check_packing(net: nn.Module, name: str, *, checkpointing: bool, sharded: bool) -> None:
    """Raise ConfigError for a network, ready to train, or settings that packing is not for."""
    setting, advice = "model.pack_crops", "set model.pack_crops=false"
    if sharded:
        raise ConfigError(f"{setting}: optim.shard gathers whole blocks, not their parts; {advice}")
    if checkpointing:
        raise ConfigError(
            f"{setting}: model.checkpoint_activations computes whole blocks again, not their "
            f"parts; set model.checkpoint_activations=false, or {advice}"
        )
    obstacle = _obstacle(net)
    if obstacle:
        raise ConfigError(f"{setting}: {name} {obstacle}; {advice}")


def fits(net: nn.Module) -> bool:
    """Whether `class_features` gives what ``net(x)`` gives, and passes by nobody who listens."""
    return not _obstacle(net) and not net.grad_checkpointing


def class_features(net: Any, groups: list[Tensor]) -> Tensor:
    """What ``net(x)`` returns for each group of normalised images ``[N, C, H, W]``, as one.

    ``[sum N, D]``; `net` `fits`. Stochastic depth draws the same numbers as in ``net(x)`` for one
    group after the other.
    """
    embedded, drawn = [], []
    for images in groups:
        embedded.append(cls_only.embed(net, images))  # [N, T, D]
        drawn.append(_draw(net.blocks, embedded[-1]))  # [2 * blocks, N, 1]
    shapes = tuple((x.shape[0], x.shape[1]) for x in embedded)
    of_tokens = [f.expand(-1, -1, t).flatten(1) for f, (_, t) in zip(drawn, shapes, strict=True)]
    factors = torch.cat(of_tokens, 1)[..., None]  # [2 * blocks, M, 1], M = sum N * T
    x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # [M, D]
    for index, block in enumerate(net.blocks[:-1]):
        forward = _program() if is_compiled(block) else _block
        x = forward(block, x, shapes, *_factors_of(block, factors[2 * index : 2 * index + 2]))
    last = net.blocks[-1]
    of_images = torch.cat([f[-2:] for f in drawn], 1)[..., None]  # [2, sum N, 1, 1]
    rows = cls_only.ROWS_READ[type(net)]
    first = _first_rows(last, x, shapes, rows, _factors_of(last, of_images))
    return net.forward_head(net.norm(first))


def _draw(blocks: Any, x: Tensor) -> Tensor:
    """Factors of stochastic depth ``[2 * blocks, N, 1]`` for ``[N, T, D]``; 1 where it is off.

    What the blocks' own `DropPath` would draw, in their order.
    """
    factors = x.new_ones(2 * len(blocks), len(x), 1)
    paths = (path for block in blocks for path in (block.drop_path1, block.drop_path2))
    for index, path in enumerate(paths):
        if drops(path):
            keep = 1 - path.drop_prob
            factors[index].bernoulli_(keep)
            if path.scale_by_keep and keep > 0:
                factors[index].div_(keep)
    return factors


def _factors_of(block: Any, two: Tensor) -> list[Factor]:
    """The block's factors ``[2, ...]``, for attention and MLP, less those that are off."""
    paths = block.drop_path1, block.drop_path2
    return [factor if drops(path) else None for path, factor in zip(paths, two, strict=True)]


@functools.cache
def _program() -> Callable[..., Tensor]:
    return torch.compile(_block, dynamic=False)


def _block(block: Any, x: Tensor, shapes: Shapes, first: Factor, second: Factor) -> Tensor:
    """timm's block on the tokens of all groups ``[M, D]``; factors ``[M, 1]``."""
    return after_attention(block, x, _attend(block.attn, block.norm1(x), shapes), first, second)


def _first_rows(block: Any, x: Tensor, shapes: Shapes, rows: int, factors: list[Factor]) -> Tensor:
    """The first `rows` tokens that a block makes of every image: ``[sum N, rows, D]``."""
    normed = _parted(block.norm1(x), shapes)
    looked = torch.cat([cls_only.attend(block.attn, tokens, rows) for tokens in normed])
    first = torch.cat([tokens[:, :rows] for tokens in _parted(x, shapes)])  # [sum N, rows, D]
    return after_attention(block, first, looked, *factors)


def _attend(attention: Any, x: Tensor, shapes: Shapes) -> Tensor:
    """timm's attention among the tokens of each image, for all groups ``[M, D]``."""
    parts = _parted(attention.qkv(x), shapes)  # [N, T, 3 * heads * d] each
    out = torch.cat([_look(attention, qkv).flatten(0, 1) for qkv in parts])  # [M, heads * d]
    if hasattr(attention, "norm"):
        out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj(out)


def _look(attention: Any, qkv: Tensor) -> Tensor:
    """Of queries, keys and values ``[N, T, 3 * heads * d]`` what is seen: ``[N, T, heads * d]``."""
    qkv = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # [N, heads, T, d] each
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q * attention.scale @ k.transpose(-2, -1)).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def _parted(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """All tokens ``[M, D]`` as ``[N, T, D]`` for each group; views."""
    parts = x.split([n * t for n, t in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _obstacle(net: Any) -> str:
    """Why the network cannot be packed, or "", as far as anybody could tell."""
    if not cls_only.reads_class_token(net) or not all(map(cls_only.is_standard, net.blocks)):
        return "is not one of timm's plain vision transformers that pool by their class token"
    for name, module in net.named_modules():
        if is_watched(module):
            return f"has a hook on {name or 'itself'}, which packing passes by; remove it"
        if cls_only.mixes_rows(module):
            return f"has dropout or a batch norm ({name}); take it out of model.args"
    return ""
