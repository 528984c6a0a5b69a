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

from dino_kd.models.cls_only import is_watched

Program = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]


def compile_blocks(net: nn.Module) -> int:
    """Let timm's standard blocks inside `net` run compiled, in place; returns how many there are.

    The first step of every input shape compiles. A block with a hook inside runs as it was.
    """
    blocks = [module for module in net.modules() if type(module) is Block]
    for block in blocks:
        block.forward = functools.partial(_forward, block)  # type: ignore[method-assign]
    return len(blocks)


def _forward(block: Any, x: Tensor, **options: Any) -> Tensor:
    """What ``block(x)`` returns."""
    if options or any(is_watched(module) for module in block.modules()):
        return Block.forward(block, x, **options)
    # Attention and MLP draw in this order; between them nothing else is drawn without dropout.
    factors = _drawn(block.drop_path1, x), _drawn(block.drop_path2, x)
    return _program()(block, x, *factors)


def _drawn(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factor of stochastic depth for every image ``[N, 1, 1]``; None: it is off."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return None
    return drop_path(x.new_ones(len(x), 1, 1))


@functools.cache
def _program() -> Program:
    return torch.compile(_block, dynamic=False)


def _block(block: Any, x: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """timm's block with stochastic depth as given factors."""
    change = block.ls1(block.attn(block.norm1(x)))  # [N, T, D]
    x = x + (change if first is None else change * first.to(change.dtype))
    change = block.ls2(block.mlp(block.norm2(x)))
    return x + (change if second is None else change * second.to(change.dtype))
