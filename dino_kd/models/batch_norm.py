"""Running statistics of batch norms: a forward pass changes them in place, whatever comes of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_kd.distributed import all_reduce_mean, world_size
from dino_kd.models.backbone import Backbone


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


@torch.no_grad()
def recalibrate(
    backbone: Backbone, batches: Iterable[Tensor], device: str | torch.device = "cpu"
) -> None:
    """Replace running statistics by the mean of those of `batches`, in place; weights stay.

    For networks trained on mixed images, whose statistics are not those of the images they will
    see. A network without batch norms is left alone, and no batch is read.

    Args:
        backbone: on `device`; its training mode is restored.
        batches: uint8 ``[B, C, H, W]``; one of a single image, which may have no variance, is
            left out.
        device: where the network is.
    """
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(module, module.training) for module in backbone.modules()]
    momenta = [norm.momentum for norm in norms]
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    try:
        for images in batches:
            if len(images) == 1:
                continue
            backbone(backbone.preprocess(images.to(device)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
