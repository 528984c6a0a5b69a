"""The blocks of a vision transformer through torch.compile, one program for all of them.

Compiling the whole network takes minutes and compiles the same block a dozen times. Here one block
is compiled, as a function of the block's weights: seconds. What differs between blocks, the rate
of stochastic depth, comes in as the factors it drew, so that no block needs a program of its own.
Names of weights, checkpoints and results (up to rounding) stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_kd.models.watched import is_watched, unsharded_class

_PROGRAMS = 256

Program = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]


def compile_blocks(net: nn.Module) -> int:
    """Let timm's standard blocks inside `net` run compiled, in place; returns how many there are.

    The first step of every input shape compiles. A block with a hook inside runs as it was.
    """
    _configure()
    blocks = [module for module in net.modules() if unsharded_class(module) is Block]
    for block in blocks:
        block.forward = functools.partial(_forward, block)  # type: ignore[method-assign]
    return len(blocks)


def is_compiled(block: nn.Module) -> bool:
    """Whether `compile_blocks` has been here."""
    return getattr(block.forward, "func", None) is _forward


def _forward(block: Any, x: Tensor, **options: Any) -> Tensor:
    """What ``block(x)`` returns."""
    if options or any(is_watched(module) for module in block.modules()):
        return Block.forward(block, x, **options)
    # Attention and MLP draw in this order; between them nothing else is drawn without dropout.
    factors = _drawn(block.drop_path1, x), _drawn(block.drop_path2, x)
    return _program()(block, x, *factors)


def _drawn(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factor of stochastic depth for every image ``[N, 1, 1]``; None: it is off."""
    return drop_path(x.new_ones(len(x), 1, 1)) if drops(drop_path) else None


def drops(drop_path: nn.Module) -> bool:
    """Whether it is stochastic depth that draws now."""
    return isinstance(drop_path, DropPath) and drop_path.training and bool(drop_path.drop_prob)


def _configure() -> None:
    """Of torch.compile, for the whole process; these settings have no other place."""
    import torch._dynamo.config as config

    # Programs of one function, behind which further ones run uncompiled. A curriculum has five for
    # each size: teacher, and student's global and local crops, each with and without drops.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _PROGRAMS))
    # Would cut every block in two for DDP's sake, which sends gradients early all the same, as
    # the blocks are programs of their own.
    config.optimize_ddp = False


@functools.cache
def _program() -> Program:
    return torch.compile(_block, dynamic=False)


def _block(block: Any, x: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """timm's block with stochastic depth as given factors."""
    return after_attention(block, x, block.attn(block.norm1(x)), first, second)


def after_attention(
    block: Any, x: Tensor, looked: Tensor, first: Tensor | None, second: Tensor | None
) -> Tensor:
    """What a block makes of tokens ``[..., D]`` and their attention output ``[..., D]``.

    `first` and `second`: factors of stochastic depth for attention and MLP; None: it is off.
    """
    change = block.ls1(looked)  # [..., D]
    x = x + (change if first is None else change * first.to(change.dtype))
    change = block.ls2(block.mlp(block.norm2(x)))
    return x + (change if second is None else change * second.to(change.dtype))
