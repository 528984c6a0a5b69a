"""A network computed in half precision from end to end, on weights that stay float32.

Autocast takes the products in half precision and everything between them in float32: layer norms,
residual sums, and a cast on either side of each. Here the weights are cast once and the activations
keep that type, so that operations are fewer and smaller. The float32 weights are the masters:
gradients reach them through the cast, and the optimiser, the teacher's average and checkpoints see
nothing else. The price is the residual stream, which in bf16 keeps 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from dino_kd.errors import ConfigError
from dino_kd.models.backbone import Backbone


def with_low_weights(
    backbone: Backbone, passes: Sequence[Tensor | list[Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """``backbone(images)`` in `dtype` for every one of `passes`.

    Each is what `Backbone.forward` takes: normalised images ``[N, C, H, W]``, or a list of such
    groups. The weights are cast once for all.
    """
    weights = {name: p.to(dtype) for name, p in backbone.named_parameters()}
    low = [x.to(dtype) if isinstance(x, Tensor) else [g.to(dtype) for g in x] for x in passes]
    with torch.autocast(next(iter(weights.values())).device.type, enabled=False):
        return [functional_call(backbone, weights, (x,)) for x in low]


def check_low_weights(backbone: Backbone, *, checkpointing: bool, sharded: bool) -> None:
    """Raise ConfigError for what does not go together with weights that are cast for a pass."""
    name, advice = "optim.precision: bf16-params", "use optim.precision=bf16"
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ConfigError(
            f"{name}: {backbone.name} has batch norms, whose statistics need float32; {advice}"
        )
    if checkpointing:
        raise ConfigError(
            f"{name}: model.checkpoint_activations computes blocks again when the cast weights are "
            f"gone; set it to false, or {advice}"
        )
    if sharded:
        raise ConfigError(f"{name}: optim.shard casts in its own way; {advice}")
    device = next(backbone.parameters()).device
    black = torch.zeros(2, backbone.in_chans, *backbone.img_size, device=device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            with_low_weights(backbone, [black], torch.bfloat16)
    except RuntimeError:  # float32 tables, which are no weights, enter its arithmetic
        raise ConfigError(
            f"{name}: {backbone.name} cannot be computed in bf16 throughout; {advice}"
        ) from None
