"""torchvision's classification networks behind timm's interface, without their classifier.

Importing this module makes every one known to `timm.create_model` as ``torchvision_NAME``; the
tensors keep torchvision's names behind ``network.``. The feature is what torchvision's own network
gives when its last layer is an identity. Dropout is off (it sits before the classifier), stochastic
depth off unless asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model_builder, get_model_weights, list_models
from torchvision.models.swin_transformer import PatchMerging, PatchMergingV2
from torchvision.ops import StochasticDepth

PREFIX = "torchvision_"
_INSIDE = "network."
_POSITIONS = "encoder.pos_embedding"
# Heads that only training uses; torchvision's published files hold them.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# Published files of DenseNets precede PyTorch's rule against dots in module names.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
_CONTAINERS = ("features", "layers", "trunk_output", "blocks")
_POOL_THEMSELVES = ("ConvNeXt", "SqueezeNet", "MaxVit")  # their classifiers take maps


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks, sorted."""
    return list_models(module=torchvision.models)


def default_weights(name: str) -> Any:
    """torchvision's default weights of a network (a member of its enum), None where it has none."""
    weights = get_model_weights(name)
    return getattr(weights, "DEFAULT", None)


class TorchvisionNetwork(nn.Module):
    """A network that ends in a map: a CNN, Swin or MaxViT.

    Stages are the last maps of each resolution; the last is the map that is pooled, after the
    final norm where there is one.

    Args:
        name: torchvision's.
        in_chans: input channels; other than 3 gives a new first convolution.
        num_classes: 0, there is no classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0. TypeError for
            networks that know none.
        img_size: pixels; only for MaxViT, which has one fixed size.
    """

    feature_info: list[dict[str, Any]]

    def __init__(
        self,
        name: str,
        *,
        in_chans: int = 3,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if name.startswith("maxvit") and "img_size" in kwargs:
            size = kwargs.pop("img_size")
            kwargs["input_size"] = (size, size) if isinstance(size, int) else tuple(size)
        if name in ("googlenet", "inception_v3"):
            kwargs |= {"aux_logits": False, "init_weights": True}
        network = _build(name, num_classes, **kwargs)
        _set_drop_path(network, drop_path_rate)
        self.first_conv = _INSIDE + _adapt_first_conv(network, in_chans)
        self.num_classes = 0
        self._classifier = next(n for n in ("classifier", "fc", "head") if hasattr(network, n))
        self._pools_itself = type(network).__name__ in _POOL_THEMSELVES
        self._channels_last = hasattr(network, "permute")  # inside; the final map is not
        trunk = _trunk(network)
        parts = dict(network.named_children())
        if type(network).__name__ == "DenseNet":
            parts["relu"] = nn.ReLU()  # a function in torchvision's forward
            trunk.append("relu")
        parts.setdefault("avgpool", nn.AdaptiveAvgPool2d(1))
        # The children without their class: MNASNet's refuses state dicts without version numbers,
        # and safetensors keep none.
        self.network = nn.ModuleDict(parts)
        self.stages = _stages(self.network, trunk)
        self.feature_info = []
        reduction = 1
        for stage in self.stages:
            reduction *= _stride(self.network.get_submodule(stage[0]))
            self.feature_info.append({"module": _INSIDE + stage[-1], "reduction": reduction})
        self.num_features = network.num_features  # of the vector
        self.classifier_name = network.classifier_name  # torchvision's

    def forward_features(self, x: Tensor) -> Tensor:
        """The final map ``[N, C, H, W]``."""
        for stage in self.stages:
            x = self._run(stage, x)
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """The final map to one feature an image ``[N, D]``."""
        pooled = self.network["avgpool"](features)
        if not self._pools_itself:
            pooled = pooled.flatten(1)
        return self.network[self._classifier](pooled).flatten(1)

    def forward_intermediates(
        self, x: Tensor, indices: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The final map, and those of the last `indices` stages, each ``[N, C, H, W]``."""
        maps = []
        for stage in self.stages:
            x = self._run(stage, x)
            maps.append(x)
        if self._channels_last:
            maps = [stage.permute(0, 3, 1, 2) for stage in maps[:-1]] + maps[-1:]
        return x, maps[-(indices or len(maps)) :]

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to one feature each ``[N, D]``."""
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The stage of a parameter's name; what follows the trunk counts with its last stage."""
        stages = {
            _INSIDE + child: number for number, stage in enumerate(self.stages) for child in stage
        }

        def stage_of(name: str) -> float:
            if not name.startswith(_INSIDE):
                return float("inf")
            parts = name.split(".")
            heads = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            return next((stages[head] for head in heads if head in stages), len(self.stages) - 1)

        return stage_of

    def _run(self, stage: Sequence[str], x: Tensor) -> Tensor:
        for name in stage:
            x = self.network.get_submodule(name)(x)
        return x


class TorchvisionViT(nn.Module):
    """torchvision's vision transformer at any image size that its patches tile.

    Positions of another size are resampled as torchvision's `interpolate_embeddings` does (bicubic,
    corners aligned), here also to grids that are not square.

    Args:
        name: torchvision's.
        img_size: pixels, one side or (height, width), that positions are learned for.
        in_chans: input channels; other than 3 gives a new patch projection.
        num_classes: 0, there is no classifier.
    """

    num_prefix_tokens = 1
    dynamic_img_size = True

    def __init__(
        self,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        try:
            self.network = _build(name, num_classes, image_size=height, **kwargs)
        except AssertionError:  # patches do not tile it, which `Backbone` says better
            self.network = _build(name, num_classes, **kwargs)
        side = self.network.patch_size
        self.first_conv = _INSIDE + _adapt_first_conv(self.network, in_chans)
        self.num_classes = 0
        self.num_features = self.network.hidden_dim
        self.classifier_name = self.network.classifier_name  # torchvision's
        self.patch_embed = SimpleNamespace(patch_size=(side, side))
        self.grid = (height // side, width // side)
        length = 1 + self.grid[0] * self.grid[1]
        if self.network.encoder.pos_embedding.shape[1] != length:  # torchvision's is square
            positions = torch.empty(1, length, self.num_features)
            self.network.encoder.pos_embedding = nn.Parameter(positions.normal_(std=0.02))
        self.feature_info = [
            {"module": f"{_INSIDE}encoder.layers.{block}", "reduction": side}
            for block, _ in self.network.encoder.layers.named_children()
        ]

    @property
    def cls_token(self) -> Tensor:
        """The class token ``[1, 1, D]``."""
        return self.network.class_token

    @property
    def blocks(self) -> nn.Sequential:
        """The transformer's blocks."""
        return self.network.encoder.layers

    def forward_features(self, x: Tensor) -> Tensor:
        """Class token and patches after the final norm ``[N, 1 + P, D]``."""
        return self.network.encoder.ln(self.blocks(self._embed(x)))

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """The class token ``[N, D]``."""
        return self.network.heads(features[:, 0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | None = None,
        *,
        norm: bool = True,
        output_fmt: str = "NLC",
        return_prefix_tokens: bool = True,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The final tokens; patches ``[N, P, D]`` and class token of the last `indices` blocks."""
        found = []
        x = self._embed(x)
        for block in self.blocks:
            x = block(x)
            found.append(x)
        last = [self.network.encoder.ln(t) for t in found[-(indices or len(found)) :]]
        return last[-1], [(tokens[:, 1:], tokens[:, :1]) for tokens in last]

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to one feature each ``[N, D]``."""
        return self.forward_head(self.forward_features(x))

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resample the positions in place to images of (height, width) pixels."""
        side = self.network.patch_size
        grid = (img_size[0] // side, img_size[1] // side)
        encoder = self.network.encoder
        learned = encoder.pos_embedding.requires_grad
        encoder.pos_embedding = nn.Parameter(self._positions(grid).detach().clone(), learned)
        self.grid = grid

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers: stem, blocks, the final norm with the last block."""
        return {
            "stem": r"^network\.(?:class_token|conv_proj|encoder\.pos_embedding)",
            "blocks": [
                (r"^network\.encoder\.layers\.encoder_layer_(\d+)", None),
                (r"^network\.encoder\.ln", (99999,)),
            ],
        }

    def _embed(self, x: Tensor) -> Tensor:
        patches = self.network.conv_proj(x)  # [N, D, rows, columns]
        cls = self.cls_token.expand(len(x), -1, -1)
        tokens = torch.cat([cls, patches.flatten(2).transpose(1, 2)], 1)
        return tokens + self._positions((patches.shape[2], patches.shape[3]))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        positions = self.network.encoder.pos_embedding
        if grid == self.grid:
            return positions
        maps = positions[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # [1, D, rows, columns]
        maps = F.interpolate(maps.float(), size=grid, mode="bicubic", align_corners=True)
        patches = maps.flatten(2).transpose(1, 2).to(positions.dtype)
        return torch.cat([positions[:, :1], patches], 1)


def read_torchvision_weights(
    state: Mapping[str, Tensor], net: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """torchvision's state dict under the names of `net`, and sentences about what was left out.

    The classifier and the auxiliary heads of GoogLeNet and Inception are left out. Counters of
    batch norms, which files from before PyTorch 0.4.1 lack, start at 0.
    """
    own = net.state_dict()
    left_out, kept = [], {}
    classifier = net.classifier_name  # type: ignore[attr-defined]
    for key, tensor in state.items():
        if key.startswith((f"{classifier}.", *_AUXILIARY)):
            left_out.append(key)
        else:
            kept[_INSIDE + _OLD_DENSENET.sub(r"\1\2", key)] = tensor
    notes = []
    if left_out:
        # an auxiliary head has a dozen tensors
        names = sorted({k.split(".")[0] + "." if k.startswith(_AUXILIARY) else k for k in left_out})
        notes.append(f"left out, not part of the backbone: {', '.join(names)}")
    counters = [k for k in own if k.endswith(".num_batches_tracked") and k not in kept]
    if counters:
        kept |= {key: torch.zeros_like(own[key]) for key in counters}
        notes.append(f"{len(counters)} batch-norm counters start at 0; the file has none")
    return kept, notes


def trained_size(state: Mapping[str, Tensor], patch_size: int | None) -> int | None:
    """The square image side that a ViT's positions are for; None for other networks."""
    positions = state.get(_POSITIONS)
    if positions is None or patch_size is None or positions.ndim != 3:
        return None
    return patch_size * round((positions.shape[1] - 1) ** 0.5)


def _build(name: str, num_classes: int, **kwargs: Any) -> Any:
    """torchvision's network, its classifier an identity, without dropout."""
    if num_classes:
        raise ValueError(f"{PREFIX}{name} has no classifier: num_classes must be 0")
    network: Any = get_model_builder(name)(weights=None, **kwargs)
    # The classifier is registered last in all of them.
    linear = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    network.classifier_name = linear
    parent, _, child = linear.rpartition(".")
    layer = getattr(network.get_submodule(parent), child)
    network.num_features = layer.weight.shape[1]
    setattr(network.get_submodule(parent), child, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def _set_drop_path(network: nn.Module, rate: float) -> None:
    """Scale torchvision's linear stochastic depth to end at `rate`."""
    drops = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    if rate and not drops:
        raise TypeError("got an unexpected keyword argument 'drop_path_rate'")
    highest = max((drop.p for drop in drops), default=0.0) or 1.0
    for drop in drops:
        drop.p = rate * drop.p / highest


def _adapt_first_conv(network: nn.Module, in_chans: int) -> str:
    """Make the first convolution take `in_chans` channels; its name."""
    name, conv = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if in_chans != conv.in_channels:
        made = nn.Conv2d(
            in_chans,
            conv.out_channels,
            kernel_size=conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            bias=conv.bias is not None,
        )
        nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, made)
    return name


def _trunk(network: nn.Module) -> list[str]:
    """The modules that an image passes, in order, up to the final map."""
    names = []
    for name, child in network.named_children():
        if name in ("avgpool", "dropout", "fc", "classifier", "head", "flatten"):
            continue
        if name in _CONTAINERS:
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            names.append(name)
    return names


def _stages(network: nn.Module, trunk: Sequence[str]) -> list[list[str]]:
    """The trunk split before every module that lowers the resolution."""
    stages: list[list[str]] = [[]]
    for name in trunk:
        if _stride(network.get_submodule(name)) > 1 and stages[-1]:
            stages.append([])
        stages[-1].append(name)
    return stages


def _stride(module: nn.Module) -> int:
    """How much a module lowers the resolution; each of a trunk does so at most once."""
    if isinstance(module, (PatchMerging, PatchMergingV2)):
        return 2
    strides = [getattr(inner, "stride", 1) for inner in module.modules()]
    return max((s if isinstance(s, int) else s[0] for s in strides if s), default=1)


def _config(name: str) -> dict[str, Any]:
    """timm's description of the network, from torchvision's preprocessing of its weights."""
    weights = default_weights(name)
    transforms = weights.transforms() if weights is not None else None
    size = transforms.crop_size[0] if transforms is not None else 224
    mean = tuple(transforms.mean) if transforms is not None else (0.485, 0.456, 0.406)
    std = tuple(transforms.std) if transforms is not None else (0.229, 0.224, 0.225)
    if name in ("googlenet", "inception_v3"):
        # Published weights are for this; torchvision converts from ImageNet's inside the network.
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "first_conv": None,
        "classifier": None,
    }


def register(name: str) -> None:
    """Make torchvision's network `name` known to timm as ``torchvision_NAME``."""
    kind = TorchvisionViT if name.startswith("vit_") else TorchvisionNetwork

    def make(pretrained: bool = False, **kwargs: Any) -> Any:
        net: Any = build_model_with_cfg(kind, PREFIX + name, pretrained, name=name, **kwargs)
        net.pretrained_cfg["first_conv"] = net.first_conv
        return net

    make.__name__ = PREFIX + name
    make.__doc__ = f"torchvision's {name} without its classifier."
    register_model(make)


default_cfgs = generate_default_cfgs({PREFIX + name: _config(name) for name in torchvision_names()})
for _name in torchvision_names():
    register(_name)
