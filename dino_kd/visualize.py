"""Pictures of what a ViT attends to, and how well that meets known object masks."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kd.data.pictures import save_contact_sheet
from dino_kd.models.attention import cls_attention, threshold_mass
from dino_kd.models.backbone import Backbone


def save_attention_picture(
    backbones: dict[str, Backbone],
    images: Tensor,
    path: str | Path,
    *,
    masks: Tensor | None = None,
    show_heads: bool = True,
) -> None:
    """Write a PNG: image, object mask if known, mean attention of each network, heads of the last.

    Args:
        backbones: title and ViT; all take images of this size.
        images: uint8 ``[N, C, H, W]``, one row each.
        path: where to.
        masks: bool ``[N, H, W]``.
        show_heads: also one column for each head of the last network.

    Raises:
        UserError: a network has no attention between patches, or the disk is full.
    """
    columns = [("image", list(images.numpy()))]
    if masks is not None:
        columns.append(("object", list(255 * masks[:, None].to(torch.uint8).numpy())))
    size = (images.shape[-2], images.shape[-1])
    for title, backbone in backbones.items():
        attention = _attention(backbone, images)  # [N, heads, rows, columns]
        columns.append((title, _heat(attention.mean(1), size)))
    if show_heads:
        for head in range(attention.shape[1]):
            columns.append((f"head {head + 1}", _heat(attention[:, head], size)))
    save_contact_sheet(columns, path)


def attention_iou(
    backbone: Backbone, images: Tensor, masks: Tensor, *, keep: float = 0.6
) -> dict[str, float]:
    """Mean intersection over union of object masks with the patches that hold `keep` of the mass.

    Args:
        backbone: a ViT in eval mode.
        images: uint8 ``[N, C, H, W]``.
        masks: bool ``[N, H, W]``; every mask has at least one pixel.
        keep: share of the class token's attention.

    Returns:
        ``{"mean": of the heads' average map, "best_head": of the single best head}``, 0..1.
    """
    attention = _attention(backbone, images)
    per_head = [mask_iou(attention[:, h], masks, keep) for h in range(attention.shape[1])]
    return {"mean": mask_iou(attention.mean(1), masks, keep), "best_head": max(per_head)}


def mask_iou(attention: Tensor, masks: Tensor, keep: float) -> float:
    """Mean IoU of bool masks ``[N, H, W]`` with thresholded maps ``[N, rows, columns]``."""
    chosen = threshold_mass(attention.flatten(1), keep).unflatten(1, attention.shape[1:])
    height = masks.shape[1] // chosen.shape[1]  # pixels of a patch
    width = masks.shape[2] // chosen.shape[2]
    pixels = chosen.repeat_interleave(height, 1).repeat_interleave(width, 2)  # [N, H, W]
    intersection = (pixels & masks).sum((1, 2))
    union = (pixels | masks).sum((1, 2))
    return (intersection / union).mean().item()


def _attention(backbone: Backbone, images: Tensor) -> Tensor:
    """Class-token attention ``[N, heads, rows, columns]`` of uint8 images, on the CPU."""
    device = next(backbone.parameters()).device
    parts = [
        cls_attention(backbone, backbone.preprocess(part.to(device))).cpu()
        for part in images.split(64)
    ]
    return torch.cat(parts)


def _heat(attention: Tensor, size: tuple[int, int]) -> list[np.ndarray]:
    """Maps ``[N, rows, columns]`` as pictures uint8 ``[3, H, W]``, each scaled to its range."""
    low, high = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    scaled = (attention - low) / (high - low).clamp(min=1e-12)
    full = F.interpolate(scaled[:, None], size=size, mode="nearest")[:, 0].numpy()
    colours = matplotlib.colormaps["inferno"](full)[..., :3]  # [N, H, W, 3]
    return list((255 * colours).round().astype(np.uint8).transpose(0, 3, 1, 2))
