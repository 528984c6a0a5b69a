"""Whether somebody listens to a module: then nothing may pass it by.

FSDP2, which shares a module out over processes, does not listen: it makes the module whole for the
time of a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


def is_watched(module: nn.Module) -> bool:
    """Somebody waits for this module's inputs, outputs or gradients.

    FSDP2's own hooks gather the parameters that a call of the module needs: see `called_as`.
    """
    forward = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(backward) or not all(map(_gathers, forward))


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """Its class, without the one that FSDP2 has put in front of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes long
    kind = type(module)
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return next(base for base in kind.__bases__ if base is not fsdp.FSDPModule)


def called_as(forward: Callable[..., Tensor], module: nn.Module, *inputs: Any) -> Tensor:
    """``forward(module, *inputs)``; of a sharded module within a call, as its own forward pass."""
    if unsharded_class(module) is type(module):
        return forward(module, *inputs)
    before = vars(module).get("forward")
    module.forward = partial(forward, module)  # type: ignore[method-assign]
    try:
        made: Tensor = module(*inputs)
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
    return made


def _gathers(hook: Callable[..., Any]) -> bool:
    """Whether it is one of FSDP2's own."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp.")
