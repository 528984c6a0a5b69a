"""One small interface over timm's vision transformers and convolutional networks.

Any timm model, any number of channels, any input size; what differs between them (class tokens,
pooling, layouts, constructor arguments) is settled here, once, for everybody else.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dino_kd.errors import ConfigError, UserError, unknown_name

# Both make their networks known to timm.
from dino_kd.models import cifar_resnet, cls_only, packed_crops, torchvision_networks  # noqa: F401

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_USUAL_DROP_PATH = 0.1  # the recipe's default, which nobody asked for by name


@dataclass
class Tokens:
    """A network's pooled feature and its spatial features.

    Attributes:
        cls: ``[N, D]``, what `Backbone.forward` returns.
        patches: ``[N, P, Dp]`` in row-major order. Dp equals D except for CNNs that widen after
            pooling (mobilenetv3: 576 and 1024).
        grid: (rows, columns) with rows * columns = P.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Backbone(nn.Module):
    """A timm network without classifier. Build it with `create_backbone`.

    Attributes:
        net: the timm model; its state dict is what is saved.
        name: timm's name of the architecture, without a pretraining tag.
        model_args: keyword arguments that rebuild `net` (plain values).
        in_chans: input channels.
        img_size: (height, width) it was built for; other sizes that fit the patch work too.
        patch_size: ViT patch side in pixels, None for CNNs.
        embed_dim: width D of `forward`, measured by a forward pass.
        patch_dim: width Dp of the patch features, measured too.
        mean, std: per channel, for images scaled to 0..1.
        notes: sentences about how the weights were loaded.
    """

    net: Any  # timm models share methods, not a class
    _scale: Tensor
    _offset: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        model_args: Mapping[str, Any],
        in_chans: int,
        img_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.model_args = dict(model_args)
        self.in_chans = in_chans
        self.img_size = img_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.notes: list[str] = []
        class_tokens = int(getattr(net, "cls_token", None) is not None)
        self.num_prefix_tokens = int(getattr(net, "num_prefix_tokens", class_tokens))
        self.patch_size = _patch_size(net)
        self.fusable = [n for n, m in net.named_modules() if getattr(m, "fused_attn", False)]
        scale = 1 / (255 * torch.tensor(self.std))
        offset = torch.tensor(self.mean) / torch.tensor(self.std)
        self.register_buffer("_scale", scale[:, None, None], persistent=False)  # [C, 1, 1]
        self.register_buffer("_offset", offset[:, None, None], persistent=False)  # [C, 1, 1]
        self.embed_dim, self.patch_dim, self.is_vit = self._measure()
        if not self.is_vit:
            self.patch_size = None
        check_input_size(self, img_size)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in 0..255 to normalised float32, on their device; a copy.

        For convolutions in channels-last layout, which they then keep: measured 1.3 times faster
        on a CPU in bf16 (docs/results.md).
        """
        scale, offset = self._scale.to(images.device), self._offset.to(images.device)
        layout = torch.contiguous_format if self.is_vit else torch.channels_last
        pixels = images.to(torch.float32, copy=True)  # float images are not written into
        return pixels.mul_(scale).sub_(offset).contiguous(memory_format=layout)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """Normalised images ``[N, C, H, W]`` to one feature each ``[N, D]``.

        A list of groups, each of its own size, gives the features of all ``[sum N, D]``, together
        where that can be done (`packed_crops`).

        The network's own: the final-norm class token of a ViT (with a distillation token: the mean
        of both), pooled patches of a ViT trained that way, pooled pre-logits of a CNN. Of the last
        block of a plain ViT only the rows that are read are computed (`cls_only`).
        """
        if isinstance(x, list):
            if packed_crops.fits(self.net):
                return packed_crops.class_features(self.net, x)
            return torch.cat([self(images) for images in x])
        return cls_only.class_feature(self.net, x) if cls_only.fits(self.net) else self.net(x)

    def tokens(self, x: Tensor) -> Tokens:
        """Pooled and spatial features of normalised images ``[N, C, H, W]``."""
        features = self.net.forward_features(x)
        cls = self.net.forward_head(features, pre_logits=True)  # [N, D]
        return Tokens(cls, *self.split(features, x))

    def split(self, features: Tensor, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The patches ``[N, P, Dp]`` of final features of the images `x`, and their grid."""
        if features.ndim == 4:
            if is_channels_last(self.net):
                features = features.permute(0, 3, 1, 2)
            grid = (features.shape[2], features.shape[3])
            return features.flatten(2).transpose(1, 2), grid
        patches = features[:, self.num_prefix_tokens :]
        if not patches.shape[1]:
            raise UserError(f"{self.name} gives no patches beside its class token")
        return patches, self._grid(patches.shape[1], x.shape[-2], x.shape[-1])

    def parts(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Several features of normalised images ``[N, C, H, W]`` from one forward pass.

        ``output``: what `forward` returns ``[N, D]``. ``mean``: the mean patch of the final
        features ``[N, Dp]``. ``patches``: all of them ``[N, P, Dp]``. ``block-K``: the class token
        of the K-th last block after the final norm; without a class token, and for the K-th last
        stage of a CNN, its mean patch. A network of fewer blocks gives its first one.
        """
        if list(names) == ["output"]:
            return {"output": self(x)}
        depth = max((int(name[len("block-") :]) for name in names if name.startswith("block-")),
                    default=0)  # fmt: skip
        blocks: list[Tensor] = []
        if depth:
            features, blocks = self._blocks(x, depth)
        else:
            features = self.net.forward_features(x)
        made = {f"block-{k}": blocks[max(0, len(blocks) - k)] for k in range(1, depth + 1)}
        if "output" in names:
            made["output"] = self.net.forward_head(features, pre_logits=True)
        if "mean" in names or "patches" in names:
            made["patches"] = self.split(features, x)[0]
            made["mean"] = made["patches"].mean(1)
        return {name: made[name] for name in names}

    def _blocks(self, x: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
        """The final features, and one vector of each of the last `count` blocks, in their order."""
        known = getattr(self.net, "blocks" if self.is_vit else "feature_info", None)
        intermediates = getattr(self.net, "forward_intermediates", None)
        if known is None or intermediates is None:
            raise UserError(f"{self.name} does not show its blocks; leave out block-K")
        count = min(count, len(known))
        if not self.is_vit:
            features, maps = intermediates(x, indices=count)
            return features, [stage.mean((2, 3)) for stage in maps]
        # Where the class token enters late (CaiT, XCiT, ConViT), blocks give patches alone.
        prefix = self.num_prefix_tokens > 0 and (
            "return_prefix_tokens" in inspect.signature(intermediates).parameters
        )
        more = {"return_prefix_tokens": True} if prefix else {}
        features, found = intermediates(x, indices=count, norm=True, output_fmt="NLC", **more)
        if prefix and getattr(self.net, "cls_token", None) is not None:
            return features, [tokens[1][:, 0] for tokens in found]
        patches = [tokens[0] if prefix else tokens for tokens in found]
        return features, [block.mean(1) for block in patches]

    def resize(self, img_size: int | Sequence[int]) -> Backbone:
        """Make `img_size` (pixels, one side or (height, width)) the network's own input size.

        Position embeddings are resampled (bicubic, antialiased) from their true grid. In place;
        returns itself. Raises ConfigError when the patch or the architecture does not fit.
        """
        size = as_size(img_size)
        if size == self.img_size:
            return self
        check_input_size(self, size)
        if "img_size" in self.model_args:
            if not hasattr(self.net, "set_input_size"):
                raise ConfigError(
                    f"image_size: {self.name} works at {_show(self.img_size)} px only, "
                    f"got {_show(size)}"
                )
            with torch.no_grad():
                self.net.set_input_size(img_size=size)
            self.model_args["img_size"] = list(size)
        self.img_size = size
        return self

    def _grid(self, count: int, height: int, width: int) -> tuple[int, int]:
        if self.patch_size and (height // self.patch_size) * (width // self.patch_size) == count:
            return height // self.patch_size, width // self.patch_size
        # Hierarchical token networks: the grid has the aspect ratio of the image.
        rows = max(1, round(math.sqrt(count * height / width)))
        if rows * (count // rows) != count:
            raise ConfigError(f"model.backbone: {self.name} has no rectangular grid of patches")
        return rows, count // rows

    def _measure(self) -> tuple[int, int, bool]:
        """(embed_dim, patch_dim, is_vit) from one forward pass of one black image.

        Widths that networks report are not reliable (mobilenetv3_small_100: 576, gives 1024). In
        eval mode, so that batch-norm statistics and the random generator stay as they are.
        """
        height, width = self.img_size
        if self.patch_size and getattr(self.net, "dynamic_img_size", False):
            height = width = self.patch_size  # one patch tells the width at a fraction of the cost
        modes = [(module, module.training) for module in self.net.modules()]
        self.net.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                probe = torch.zeros(1, self.in_chans, height, width)
                features = self.net.forward_features(probe)
                cls = self.net.forward_head(features, pre_logits=True)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            raise ConfigError(
                f"model.backbone: {self.name} cannot take {self.in_chans} x "
                f"{_show((height, width))} images ({_first_line(error)})"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        if not isinstance(features, Tensor) or features.ndim not in (3, 4) or cls.ndim != 2:
            raise ConfigError(
                f"model.backbone: {self.name} does not give one vector per image and one map of "
                "patches; choose another network"
            )
        if features.ndim == 4:
            channels_last = is_channels_last(self.net)
            return cls.shape[1], features.shape[3 if channels_last else 1], False
        side = self.patch_size
        patches = (height // side) * (width // side) if side else -1
        is_vit = features.shape[1] - self.num_prefix_tokens == patches
        return cls.shape[1], features.shape[2], is_vit


def create_backbone(
    name: str,
    *,
    in_chans: int = 3,
    img_size: int | Sequence[int] = 224,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    args: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a timm network. Draws its initial weights from torch's global generator.

    Args:
        name: any timm model, ViT or CNN, or `resnet18_cifar`.
        in_chans: input channels.
        img_size: pixels, one side or (height, width). ViTs learn positions for this size and
            resample them for others.
        patch_size: ViT patch side in pixels; None: as the name says.
        drop_path: stochastic depth rate. Networks that know none (VGG, DenseNet) ignore 0 and the
            recipe's default 0.1; any other value is an error for them.
        pretrained: load timm's weights for this name (may download).
        mean: channel means in 0..1; None: those of the pretrained weights, else ImageNet's for
            three channels and 0.5 for others.
        std: channel deviations likewise, 0.25 for other channels.
        args: further keyword arguments of the timm model.

    Raises:
        ConfigError: unknown name, size not divisible by the patch, an argument the network does
            not accept.
    """
    if not timm.is_model(name):
        raise unknown_name("backbone", name, timm.list_models(), where="model.backbone")
    if args and "drop_path_rate" in args:
        raise ConfigError("model.args: drop_path_rate is set by model.drop_path; leave it out here")
    size = as_size(img_size)
    required = {**(args or {}), "in_chans": in_chans, "num_classes": 0}
    if patch_size is not None:
        required["patch_size"] = patch_size
    wanted = {"img_size": size, "dynamic_img_size": True, "strict_img_size": False}
    if drop_path:
        wanted["drop_path_rate"] = drop_path
    net, used = _build(name, required, wanted, pretrained)
    if drop_path not in (0, _USUAL_DROP_PATH) and "drop_path_rate" not in used:
        raise ConfigError(
            f"model.drop_path: {name} has no stochastic depth; set it to 0, got {drop_path}"
        )
    used.pop("drop_path_rate", None)  # of training, not of the architecture
    default_mean, default_std = _default_statistics(net, in_chans, pretrained)
    backbone = Backbone(
        net,
        name=name.partition(".")[0],
        model_args={k: list(v) if isinstance(v, tuple) else v for k, v in used.items()},
        in_chans=in_chans,
        img_size=size,
        mean=_per_channel("data.mean", mean, default_mean, in_chans),
        std=_per_channel("data.std", std, default_std, in_chans),
    )
    if patch_size is not None and not backbone.is_vit:
        raise ConfigError(f"model.patch_size: {name} is no ViT and has no patches; leave it out")
    if patch_size is not None and backbone.patch_size != patch_size:
        raise ConfigError(
            f"model.patch_size: {name} has a CNN before its patches and cannot make them "
            f"{patch_size} px; leave it out"
        )
    return backbone


def as_size(size: int | Sequence[int]) -> tuple[int, int]:
    """One side or (height, width) to (height, width), in pixels."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_input_size(backbone: Backbone, size: tuple[int, int], where: str = "image size") -> None:
    """Raise ConfigError when a ViT's patches do not tile `size` (height, width)."""
    side = backbone.patch_size
    if side and (size[0] % side or size[1] % side):
        fitting = tuple(max(side, round(s / side) * side) for s in size)
        raise ConfigError(
            f"{where}: {_show(size)} px does not divide into patches of {side} px "
            f"({backbone.name}); the nearest size that does is {_show(fitting)}"
        )


def _build(
    name: str, required: dict[str, Any], wanted: dict[str, Any], pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Call timm with the `wanted` arguments that this network's constructor knows.

    timm's constructors differ and say so by TypeError; asking them beats a list of names. The
    random state is the same for every attempt.
    """
    wanted = {key: value for key, value in wanted.items() if key not in required}
    random_state = torch.get_rng_state()
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, **required, **wanted), {
                **required,
                **wanted,
            }
        except TypeError as error:
            match = re.search(r"unexpected keyword argument(?:\(s\))?:? \[?'(\w+)'", str(error))
            if match is None:
                raise ConfigError(f"model.args: {name} cannot be built: {error}") from error
            rejected = match[1]
            if rejected in wanted:
                del wanted[rejected]
            elif rejected == "patch_size" and rejected in required:
                raise ConfigError(
                    f"model.patch_size: {name} is no ViT and has no patches; leave it out"
                ) from None
            else:
                raise ConfigError(f"model.args: {name} does not accept {rejected!r}") from None
            torch.set_rng_state(random_state)
        except (AssertionError, ValueError, RuntimeError, AttributeError) as error:
            if pretrained:
                raise
            raise ConfigError(
                f"model.backbone: {name} cannot be built with {required | wanted} "
                f"({_first_line(error)})"
            ) from error


def _patch_size(net: nn.Module) -> int | None:
    embed = getattr(net, "patch_embed", None)
    sides = getattr(embed, "patch_size", None)
    if sides is None:
        return None
    sides = as_size(sides)
    ratio = getattr(embed, "feature_ratio", (1, 1))  # hybrids count in pixels of their CNN's map
    sides = (sides[0] * ratio[0], sides[1] * ratio[1])
    return sides[0] if sides[0] == sides[1] else None


def is_channels_last(net: nn.Module) -> bool:
    """Whether its maps come as ``[N, H, W, C]``."""
    layout = getattr(net, "output_fmt", "NCHW")
    return str(getattr(layout, "value", layout)) == "NHWC"


def _default_statistics(
    net: nn.Module, in_chans: int, pretrained: bool
) -> tuple[Sequence[float], Sequence[float]]:
    config = getattr(net, "pretrained_cfg", None) or {}
    if pretrained and len(config.get("mean", ())) == in_chans:
        return config["mean"], config["std"]
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * in_chans, (0.25,) * in_chans


def _per_channel(
    where: str, given: Sequence[float] | None, default: Sequence[float], in_chans: int
) -> tuple[float, ...]:
    values = tuple(float(v) for v in (default if given is None else given))
    if len(values) != in_chans:
        raise ConfigError(
            f"{where}: expected {in_chans} numbers (model.in_chans), "
            f"got {len(values)}: {list(values)}"
        )
    return values


def _show(size: Sequence[int]) -> str:
    return " x ".join(str(side) for side in size)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
