"""Named outputs inside a network, from one forward pass: what teachers and students compare.

========== ================ =====================================================================
name       shape            what it is
========== ================ =====================================================================
output     ``[N, D]``       what the backbone returns
map        ``[N, Dp, h, w]`` the final features as a map, after the last norm
map-S      ``[N, C, h, w]`` the last map of stride S pixels; of a ViT S is its patch
energy     ``[N, h, w]``    mean square of a ViT's patch tokens *before* the last norm, which
                            would make it constant; of a CNN that of its final map
attention  ``[N, h, w]``    probabilities of the class token in the last block, mean of the heads
similarity ``[N, h, w]``    cosine of class token and patch; of a CNN of mean and place
prefix     ``[N, T, D]``    class, register and distillation tokens after the last norm
========== ================ =====================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd.errors import ConfigError, unknown_name
from dino_kd.models.attention import (
    attention_module,
    attention_probabilities,
    check_cls_attention,
    kept_input,
)
from dino_kd.models.backbone import Backbone, is_channels_last

_FIXED = ("output", "map", "energy", "attention", "similarity", "prefix")


def taps(backbone: Backbone, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The outputs `names` of normalised images ``[N, C, H, W]``, from one forward pass.

    Raises ConfigError for a name that this network does not have; `check_taps` says so earlier.
    """
    if not names:
        return {}
    with contextlib.ExitStack() as hooks:
        attention = attention_module(backbone, -1) if "attention" in names else None
        seen = hooks.enter_context(kept_input(attention)) if attention is not None else []
        norm = backbone.net.norm if _has_last_norm(backbone) and "energy" in names else None
        raw = hooks.enter_context(kept_input(norm)) if norm is not None else []
        features, made = _forward(backbone, x, _strides(names))
    if "output" in names:
        made["output"] = backbone.net.forward_head(features, pre_logits=True)  # [N, D]
    if "prefix" in names:
        made["prefix"] = features[:, : backbone.num_prefix_tokens]
    if {"map", "energy", "similarity"} & set(names):
        made["map"] = _as_map(backbone, features, x)
    if "energy" in names:
        source = _as_map(backbone, raw[-1], x) if raw else made["map"]
        made["energy"] = source.float().square().mean(1)
    if "similarity" in names:
        made["similarity"] = _similarity(backbone, features, made["map"])
    if attention is not None:
        looks = attention_probabilities(attention, seen[0], 1)[:, :, 0].mean(1)  # [N, T]
        patches = looks[:, backbone.num_prefix_tokens :]
        made["attention"] = patches.unflatten(-1, backbone.split(features, x)[1])
    return {name: made[name] for name in names}


@torch.no_grad()
def tap_shapes(
    backbone: Backbone, names: Sequence[str], size: tuple[int, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of each output without its batch axis, at `size` (height, width; its own if None).

    Runs one black image in eval mode, so that batch-norm statistics stay as they are.

    Raises:
        ConfigError: a name that this network does not have.
    """
    check_taps(backbone, names)
    device = next(backbone.parameters()).device
    black = torch.zeros(1, backbone.in_chans, *(size or backbone.img_size), device=device)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        made = taps(backbone, backbone.preprocess(black), names)
    finally:
        for module, training in modes:
            module.training = training
    return {name: tuple(value.shape[1:]) for name, value in made.items()}


def map_strides(backbone: Backbone) -> list[int]:
    """Strides in pixels of the maps that `taps` can give, ascending."""
    if backbone.is_vit:
        return [backbone.patch_size] if backbone.patch_size else []
    info = getattr(backbone.net, "feature_info", None) or []
    if not hasattr(backbone.net, "forward_intermediates"):
        return []
    return sorted({int(stage["reduction"]) for stage in _entries(info)})


def check_taps(backbone: Backbone, names: Sequence[str]) -> None:
    """Raise a ConfigError for the first name that this network does not have."""
    for name in names:
        if name.startswith("map-"):
            known = [f"map-{stride}" for stride in map_strides(backbone)]
            if name not in known:
                raise ConfigError(
                    f"{backbone.name} has no {name!r}; it has {', '.join([*known, 'map'])}"
                )
        elif name not in _FIXED:
            raise unknown_name("tap", name, [*_FIXED, "map-16"])
        elif name == "attention":
            check_cls_attention(backbone)
        elif name == "prefix" and not backbone.num_prefix_tokens:
            raise ConfigError(f"{backbone.name} has no class token")


def _forward(
    backbone: Backbone, x: Tensor, strides: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The final features, and the maps of the given strides by name."""
    if not strides:
        return backbone.net.forward_features(x), {}
    if backbone.is_vit:
        features = backbone.net.forward_features(x)
        return features, {f"map-{stride}": _as_map(backbone, features, x) for stride in strides}
    stages = _entries(backbone.net.feature_info)
    last = {int(stage["reduction"]): number for number, stage in enumerate(stages)}
    features, maps = backbone.net.forward_intermediates(x, indices=[last[s] for s in strides])
    return features, {f"map-{s}": made for s, made in zip(strides, maps, strict=True)}


def _entries(info: Any) -> list[dict[str, Any]]:
    """timm's list of stages, which some networks keep inside an object."""
    return list(info.info) if hasattr(info, "info") else list(info)


def _strides(names: Sequence[str]) -> list[int]:
    return sorted(int(name.removeprefix("map-")) for name in names if name.startswith("map-"))


def _has_last_norm(backbone: Backbone) -> bool:
    return backbone.is_vit and isinstance(getattr(backbone.net, "norm", None), nn.LayerNorm)


def _as_map(backbone: Backbone, features: Tensor, x: Tensor) -> Tensor:
    """Final features as ``[N, Dp, h, w]``."""
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if is_channels_last(backbone.net) else features
    patches, grid = backbone.split(features, x)
    return patches.transpose(1, 2).unflatten(-1, grid)


def _similarity(backbone: Backbone, features: Tensor, final_map: Tensor) -> Tensor:
    """Cosine of the class token, or of the mean of the map, with every place ``[N, h, w]``."""
    has_token = features.ndim == 3 and getattr(backbone.net, "cls_token", None) is not None
    pooled = features[:, 0] if has_token else final_map.mean((2, 3))  # [N, Dp]
    return F.cosine_similarity(pooled.float()[:, :, None, None], final_map.float(), dim=1)
