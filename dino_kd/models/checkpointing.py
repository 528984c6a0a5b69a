"""Activation checkpointing (Chen et al. 2016): a third more arithmetic, much less memory."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from dino_kd.errors import ConfigError
from dino_kd.models.backbone import Backbone


def checkpoint_activations(backbone: Backbone) -> None:
    """Keep only each block's input for the backward pass, in place; gradients stay the same.

    Raises:
        ConfigError: the network cannot, or has batch norms, which would count every batch twice.
    """
    name = "model.checkpoint_activations"
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ConfigError(
            f"{name}: {backbone.name} has batch norms, whose statistics would count every batch "
            "twice; set it to false, and use optim.accumulate to save memory"
        )
    try:
        backbone.net.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ConfigError(f"{name}: {backbone.name} does not offer it; set it to false") from error
