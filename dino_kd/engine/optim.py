"""Parameter groups, optimisers and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dino_kd.distributed import all_reduce_sum, is_sharded_tensor, local_part
from dino_kd.errors import unknown_name

OPTIMIZERS = ("adamw", "sgd", "lars")
# Positions and single tokens rather than maps; compared with the last part of the name.
_TOKEN_NAMES = {
    "cls_token",
    "class_token",  # torchvision's
    "dist_token",
    "reg_token",
    "mask_token",
    "pos_embed",
    "pos_embedding",  # torchvision's
    "latent",
}


def parameter_groups(module: nn.Module, last_layer: Iterable[nn.Parameter] = ()) -> list[dict]:
    """Trainable parameters in up to three groups: decayed, not decayed, and the last layer.

    Biases, norms and everything else with at most one dimension larger than 1, and position and
    class tokens, get no weight decay. The last layer's group carries ``is_last_layer`` so that it
    can be frozen for the first steps.
    """
    last = {id(p) for p in last_layer}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    prototypes: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in last:
            prototypes.append(parameter)
        elif _has_weight_decay(name, parameter):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "has_weight_decay": True, "is_last_layer": False},
        {"params": plain, "has_weight_decay": False, "is_last_layer": False},
        {"params": prototypes, "has_weight_decay": True, "is_last_layer": True},
    ]
    return [group for group in groups if group["params"]]


def scaled_groups(module: nn.Module, lr_scales: Mapping[str, float]) -> list[dict]:
    """Trainable parameters by their share of the learning rate, and within it decayed or not.

    Args:
        module: what is trained.
        lr_scales: for every trainable parameter's name the factor on the learning rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (lr_scales[name], _has_weight_decay(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": found, "lr_scale": scale, "has_weight_decay": decayed, "is_last_layer": False}
        for (scale, decayed), found in groups.items()
    ]


def _has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    return (
        sum(size > 1 for size in parameter.shape) > 1
        and name.rpartition(".")[2] not in _TOKEN_NAMES
    )


def make_optimizer(
    name: str, groups: list[dict], *, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999), SGD or LARS. Learning rate and decay come from `apply_values`."""
    if name == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=0.0)
    if name == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=0.0, momentum=momentum, weight_decay=0.0)
    raise unknown_name("optimiser", name, OPTIMIZERS, "optim.name")


def apply_values(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    """Set this step's learning rate, times a group's ``lr_scale``, and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = values["lr"] * group.get("lr_scale", 1.0)
        group["weight_decay"] = values["weight_decay"] if group["has_weight_decay"] else 0.0


def drop_frozen_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Forget the last layer's gradients: it stays where it is, and AdamW keeps no moments of it.

    A head that is told so computes none; data parallelism then leaves zeros.
    """
    for group in optimizer.param_groups:
        if group["is_last_layer"]:
            for parameter in group["params"]:
                parameter.grad = None


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm` (0: leave them).

    Of sharded gradients every process scales its slices by the norm of the whole.

    Returns the norm before clipping as a scalar tensor; reading it is the caller's business, so
    that nothing here waits for the device.
    """
    found = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    gradients = [local_part(gradient) for gradient in found]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if any(is_sharded_tensor(gradient) for gradient in found):  # then all are
        norm = all_reduce_sum(norm.double().square()).sqrt().to(norm.dtype)
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
