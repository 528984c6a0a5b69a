"""The layers of a network in order: how deep a parameter lies, and stochastic depth across them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.models import group_parameters
from torch import nn

from dino_kd.errors import ConfigError
from dino_kd.models.backbone import Backbone, create_backbone

_BEHIND = "~classifier"  # no network has a parameter of this name
_GIVEN_BY_NAME = ("in_chans", "img_size", "num_classes", "dynamic_img_size", "strict_img_size")


def layer_scales(backbone: Backbone, decay: float) -> dict[str, float]:
    """Layer-wise learning-rate decay: ``decay ** (layers between a parameter and the classifier)``.

    The layers are timm's `group_matcher`: for a ViT the stem (patches, tokens, positions), then
    every block, the final norm counting with the last block; for a CNN the stem, then every stage.
    A classifier behind the network has scale 1. With 3 blocks and 0.5: stem 1/16, blocks 1/8, 1/4,
    1/2 (BEiT, arXiv 2106.08254, appendix; BEiT gives the final norm the classifier's scale).

    Args:
        backbone: any timm network.
        decay: above 0, at most 1; 1 scales nothing.

    Returns:
        a scale in 0..1 for every parameter name of ``backbone.net``.

    Raises:
        ConfigError: the network does not say what its layers are, and decay is not 1.
    """
    if decay == 1:
        return {name: 1.0 for name, _ in backbone.net.named_parameters()}
    if not hasattr(backbone.net, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay: {backbone.name} does not say what its layers are; set it to 1, "
            f"got {decay}"
        )
    matcher = backbone.net.group_matcher(coarse=not backbone.is_vit)
    depths = group_parameters(_WithClassifier(backbone.net), matcher, reverse=True)  # type: ignore[arg-type]
    behind = depths.pop(_BEHIND)
    return {name: decay ** (behind - depth) for name, depth in depths.items()}


@dataclass
class _WithClassifier:
    """A network's parameters and one that stands for the classifier behind it."""

    net: nn.Module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter | None]]:
        yield from self.net.named_parameters()
        yield _BEHIND, None


def with_drop_path(backbone: Backbone, rate: float) -> Backbone:
    """The same network and weights with stochastic depth, on the same device.

    The rate grows linearly over the blocks up to `rate`, as timm has it. Networks that know no
    stochastic depth ignore 0 and the usual 0.1.

    Raises:
        ConfigError: another rate for such a network.
    """
    if not rate:
        return backbone
    args = {key: arg for key, arg in backbone.model_args.items() if key not in _GIVEN_BY_NAME}
    try:
        with torch.random.fork_rng(devices=[]):  # the new weights are replaced at once
            made = create_backbone(
                backbone.name,
                in_chans=backbone.in_chans,
                img_size=backbone.img_size,
                drop_path=rate,
                mean=backbone.mean,
                std=backbone.std,
                args=args,
            )
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.drop_path", "drop_path")) from None
    made.net.load_state_dict(backbone.net.state_dict())
    made.notes = list(backbone.notes)
    return made.to(next(backbone.parameters()).device)
