"""Whether somebody listens to a module: then nothing may pass it by."""

from __future__ import annotations

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Somebody waits for this module's inputs, outputs or gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
