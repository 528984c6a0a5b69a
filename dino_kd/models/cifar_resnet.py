"""`resnet18_cifar`: ResNet-18 for 32 px images, registered with timm.

The stem is one 3x3 convolution with stride 1 and no max-pooling, as published CIFAR results of
self-supervised ResNets use it. Importing this module makes the name known to `timm.create_model`.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


class CifarResNet(ResNet):
    """timm's ResNet with a stem that keeps the full resolution."""

    conv1: Any
    maxpool: Any
    feature_info: list[dict[str, Any]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        in_chans, width = self.conv1.in_channels, self.conv1.out_channels
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for index, info in enumerate(self.feature_info):
            # The removed stem halved the resolution twice before stage 1, once before its end.
            info["reduction"] = max(1, info["reduction"] // (2 if index == 0 else 4))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with a 3x3 stride-1 stem: 11.2 M parameters, 512 features. No published weights."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **model_args)
