"""Pictures of what a backbone sees: attention, principal components of patches, similarity.

Pictures are uint8 ``[C, H, W]``. Attention masks follow the DINO paper (Caron et al. 2021).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kd.data.pictures import Column, save_contact_sheet, shown_bands
from dino_kd.models.attention import cls_attention, cls_attention_and_tokens, threshold_mass
from dino_kd.models.backbone import Backbone

_DIM = 0.28  # brightness of what lies outside a mask
_OUTLINE = (255, 196, 0)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]  # ITU-R 601


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
    columns: list[Column] = [("image", list(images.numpy()))]
    if masks is not None:
        columns.append(("object", list(255 * masks[:, None].to(torch.uint8).numpy())))
    size = (images.shape[-2], images.shape[-1])
    for title, backbone in backbones.items():
        attention = _attention(backbone, images)  # [N, heads, rows, columns]
        columns.append((title, heat_pictures(attention.mean(1), size)))
    if show_heads:
        for head in range(attention.shape[1]):
            columns.append((f"head {head + 1}", heat_pictures(attention[:, head], size)))
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


@torch.no_grad()
def attention_and_patches(
    backbone: Backbone,
    images: Tensor,
    *,
    block: int = -1,
    with_attention: bool = True,
    precision: str = "fp32",
) -> tuple[Tensor | None, Tensor]:
    """What the pictures are made of, from one forward pass, float32 on the CPU.

    Args:
        backbone: a ViT or CNN in eval mode.
        images: uint8 ``[N, C, H, W]``.
        block: whose attention; -1 is the last. Patches are always the final ones.
        with_attention: False for networks that have none to show.
        precision: "fp32" or "bf16" (autocast).

    Returns:
        attention of the class token ``[N, heads, rows, columns]`` or None, and patches
        ``[N, rows, columns, D]``.

    Raises:
        UserError: see `cls_attention`.
    """
    device = next(backbone.parameters()).device
    x = backbone.preprocess(images.to(device))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        if with_attention:
            attention, tokens = cls_attention_and_tokens(backbone, x, block)
        else:
            attention, tokens = None, backbone.tokens(x)
    patches = tokens.patches.float().cpu().unflatten(1, tokens.grid)
    return None if attention is None else attention.float().cpu(), patches


def heat_pictures(maps: Tensor, size: tuple[int, int]) -> list[np.ndarray]:
    """Maps ``[N, rows, columns]`` as pictures uint8 ``[3, H, W]``, each scaled to its range."""
    full = _enlarged(_to_range(maps), size)
    return list(_bytes(_inferno(full)).transpose(0, 3, 1, 2))


def heat_over_image(image: np.ndarray, heat: Tensor) -> np.ndarray:
    """One map ``[rows, columns]`` over its image uint8 ``[C, H, W]``, as uint8 ``[3, H, W]``.

    Where the map is strong its colour covers the image; where it is weak the image is dark grey.
    """
    full = _enlarged(_to_range(heat[None]), image.shape[-2:])[0]  # [H, W]
    colours = _inferno(full).transpose(2, 0, 1)
    cover = 0.25 + 0.45 * full
    grey = _grey(image) * 0.75
    return _bytes(cover * colours + (1 - cover) * grey)


def mask_over_image(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """The image uint8 ``[C, H, W]`` inside a bool mask ``[rows, columns]``, dark grey outside.

    The mask is outlined. Returns uint8 ``[3, H, W]``.
    """
    height, width = image.shape[-2:]
    inside = _enlarged(mask[None].float(), (height, width))[0] > 0.5  # [H, W]
    picture = np.where(inside, shown_bands(image) / np.float32(255), _grey(image) * _DIM)
    picture = _bytes(picture)
    picture[:, _outline(inside, max(1, round(min(height, width) / 160)))] = np.array(
        _OUTLINE, dtype=np.uint8
    )[:, None]
    return picture


def colour_picture(colours: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Colours 0..1 ``[rows, columns, 3]`` of patches as a picture uint8 ``[3, H, W]``."""
    full = F.interpolate(colours.permute(2, 0, 1)[None], size=size, mode="nearest")[0]
    return _bytes(full.numpy())


def patch_at(point: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch at a point (across, down), each 0..1 of the image."""
    across, down = point
    return min(int(down * grid[0]), grid[0] - 1), min(int(across * grid[1]), grid[1] - 1)


def patch_similarity(patches: Tensor, chosen: tuple[int, int]) -> Tensor:
    """Cosine ``[rows, columns]`` of every patch ``[rows, columns, D]`` with the chosen one."""
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit[chosen]


def patch_marked(image: np.ndarray, chosen: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The image uint8 ``[C, H, W]`` with one patch outlined, as uint8 ``[3, H, W]``."""
    height, width = image.shape[-2:]
    mask = torch.zeros(grid)
    mask[chosen] = 1
    inside = _enlarged(mask[None], (height, width))[0] > 0.5
    picture = shown_bands(image).copy()
    edge = _outline(inside, max(1, round(min(height, width) / 112)))
    picture[:, edge] = np.array(_OUTLINE, dtype=np.uint8)[:, None]
    return picture


def _attention(backbone: Backbone, images: Tensor) -> Tensor:
    """Class-token attention ``[N, heads, rows, columns]`` of uint8 images, on the CPU."""
    device = next(backbone.parameters()).device
    parts = [
        cls_attention(backbone, backbone.preprocess(part.to(device))).cpu()
        for part in images.split(64)
    ]
    return torch.cat(parts)


def _to_range(maps: Tensor) -> Tensor:
    """Each map ``[N, rows, columns]`` scaled to 0..1; a constant one becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def _enlarged(maps: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """float32 ``[N, H, W]``: every patch stays one flat block, which is all that is known of it."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="nearest")[:, 0].numpy()


def _inferno(values: np.ndarray) -> np.ndarray:
    return matplotlib.colormaps["inferno"](values)[..., :3]


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma 0..1 ``[1, H, W]``."""
    return (shown_bands(image) * _LUMA).sum(0, keepdims=True) / 255


def _outline(inside: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a bool ``[H, W]`` within `width` of its border, the picture's edge included."""
    padded = torch.from_numpy(np.pad(inside, width)).float()[None, None]
    core = 1 - F.max_pool2d(1 - padded, 2 * width + 1, stride=1)[0, 0]
    return inside & ~(core.numpy() > 0.5)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (255 * values).round().astype(np.uint8)
