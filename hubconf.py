"""Load a backbone by `torch.hub.load(".", "backbone", "runs/x", source="local")`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

dependencies = ["torch", "timm", "safetensors", "pydantic", "yaml"]


def backbone(
    source: str,
    branch: str = "teacher",
    img_size: int | Sequence[int] | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Load a backbone in eval mode: images ``[N, C, H, W]``, normalised, to features ``[N, D]``.

    Args:
        source: run directory, folder in timm's format, 'timm:NAME', 'torchvision:NAME',
            'random:NAME', or a DINO / DINOv2 checkpoint file.
        branch: "teacher", "student" or "untrained" of a run directory.
        img_size: pixels, one side or (height, width); None: as it was trained.
        device: where to put it.
    """
    from dino_kd.pretrained import load_backbone

    return load_backbone(source, branch=branch, img_size=img_size, device=device)
