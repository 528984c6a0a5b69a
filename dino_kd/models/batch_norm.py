"""Running statistics of batch norms: a forward pass changes them in place, whatever comes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_kd.distributed import all_reduce_mean, world_size


class BatchNormStatistics:
    """The statistics of all batch norms inside `module`; none in a ViT.

    A task calls `remember` before the forward passes of a step, and after it `settle`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Keep a copy of the state before the step; further calls in the same step do nothing."""
        if not self._before:
            self._before = [buffer.clone() for buffer in self._buffers()]

    @torch.no_grad()
    def settle(self, skipped: bool) -> None:
        """Undo a skipped step; after any other, take the mean over processes.

        So all processes score and save the same statistics.
        """
        if skipped:
            for buffer, before in zip(self._buffers(), self._before, strict=True):
                buffer.copy_(before)
        else:
            self._average()
        self._before = []

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self._norms for buffer in module.buffers()]

    def _average(self) -> None:
        floating = [buffer for buffer in self._buffers() if buffer.is_floating_point()]
        if world_size() == 1 or not floating:
            return
        packed = all_reduce_mean(torch.cat([buffer.flatten() for buffer in floating]))
        for buffer, mean in zip(
            floating, packed.split([buffer.numel() for buffer in floating]), strict=True
        ):
            buffer.copy_(mean.view_as(buffer))
