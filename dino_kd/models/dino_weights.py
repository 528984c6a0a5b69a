"""Published DINO and DINOv2 weights, recognised by their tensors and renamed to timm's names.

Nothing is guessed from file names: architecture, depth, patch and grid follow from the shapes.
Covers the backbones and full training checkpoints of DINO (ViT and ResNet) and DINOv2 (with and
without registers, with and without block chunks, SwiGLU).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd.errors import CheckpointError

_PREFIXES = ("module.", "backbone.", "_orig_mod.")
_HEADS = ("head.", "dino_head.", "ibot_head.", "fc.")
_TRAINING_ONLY = ("mask_token", "masked_embed")

# The layers that shapes alone cannot turn into constructor arguments come with the name.
_VIT_NAMES = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (384, 12, 8): "vit_small_patch8_224",
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (1024, 24, 16): "vit_large_patch16_224",
}
_DINOV2_SIZES = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}
_RESNET_NAMES: dict[tuple[bool, int, tuple[int, ...]], str] = {
    (False, 64, (2, 2, 2, 2)): "resnet18",
    (False, 64, (3, 4, 6, 3)): "resnet34",
    (True, 64, (3, 4, 6, 3)): "resnet50",
    (True, 64, (3, 4, 23, 3)): "resnet101",
    (True, 64, (3, 8, 36, 3)): "resnet152",
    (True, 128, (3, 4, 6, 3)): "wide_resnet50_2",
    (True, 128, (3, 4, 23, 3)): "wide_resnet101_2",
}


@dataclass(frozen=True)
class DinoWeights:
    """A timm architecture and its complete state dict.

    Attributes:
        name: timm architecture.
        in_chans: input channels.
        img_size: (height, width) in pixels of the grid of position embeddings: the one that was
            asked for, else the trained one; 224 for CNNs.
        patch_size: pixels, None for CNNs.
        args: further keyword arguments of the timm model.
        state: tensors under timm's names.
        notes: what was left out, as sentences.
    """

    name: str
    in_chans: int
    img_size: tuple[int, int]
    patch_size: int | None
    args: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def choose_branch(checkpoint: Any, branch: str, where: str) -> tuple[dict[str, Tensor], bool]:
    """The state dict inside a loaded checkpoint, and whether the file holds several branches.

    Args:
        checkpoint: what the file contains.
        branch: "teacher" or "student", for training checkpoints that hold both.
        where: the file, for messages.

    Raises:
        CheckpointError: no state dict, or not this branch.
    """
    several = isinstance(checkpoint, Mapping) and any(
        b in checkpoint for b in ("student", "teacher")
    )
    if several:
        if branch not in checkpoint:
            held = [b for b in ("student", "teacher") if b in checkpoint]
            raise CheckpointError(f"{where} holds no {branch} network, only: {', '.join(held)}")
        checkpoint = checkpoint[branch]
    for nest in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(nest), Mapping):
            checkpoint = checkpoint[nest]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise CheckpointError(f"{where} holds no weights (found {type(checkpoint).__name__})")
    state = {str(k): v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(list(map(str, checkpoint))[:5])
        raise CheckpointError(f"{where} holds no weights; its entries are {keys}")
    return state, several


def read_dino_weights(
    state: Mapping[str, Tensor], where: str, img_size: tuple[int, int] | None = None
) -> DinoWeights:
    """Recognise a state dict and rename it.

    Args:
        state: tensors by name, with or without the prefixes ``module.`` and ``backbone.``.
        where: the file, for messages.
        img_size: (height, width) in pixels. A ViT's position embeddings are resampled to it by the
            authors' own rule (`resample_positions`); sizes that the patch does not divide are left
            to the caller to refuse. None: as it was trained.

    Raises:
        CheckpointError: neither a DINO ViT nor a ResNet.
    """
    bare = {_strip(key): value for key, value in state.items()}
    kept = {k: v for k, v in bare.items() if not k.startswith(_HEADS) and k not in _TRAINING_ONLY}
    notes = []
    if len(kept) < len(bare):
        left_out = sorted({k.partition(".")[0] for k in bare.keys() - kept.keys()})
        notes.append(f"left out of {where}, not part of the backbone: {', '.join(left_out)}")
    if "patch_embed.proj.weight" in kept and "cls_token" in kept and "pos_embed" in kept:
        return _read_vit(kept, where, img_size, notes)
    if "conv1.weight" in kept and "layer1.0.conv1.weight" in kept:
        return _read_resnet(kept, where, notes)
    raise CheckpointError(
        f"{where} holds no DINO or DINOv2 network that is known here (ViT with class token, or "
        f"ResNet); its entries are named {', '.join(list(state)[:4])}, ..."
    )


def _strip(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


def _read_vit(
    state: dict[str, Tensor], where: str, img_size: tuple[int, int] | None, notes: list[str]
) -> DinoWeights:
    dim, in_chans, patch, patch_width = state["patch_embed.proj.weight"].shape
    if dim % 64 or patch != patch_width:
        raise CheckpointError(
            f"{where}: a DINO ViT has square patches and a width that is a multiple of 64, "
            f"found patches of {patch} x {patch_width} px and width {dim}"
        )
    state = {_block_name(key): value for key, value in state.items()}
    depth = _count(state, r"blocks\.(\d+)\.")
    trained = _grid(state["pos_embed"].shape[1] - 1, patch, img_size, where)
    hidden = _first_shape(state, ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight"))
    scaled = "blocks.0.ls1.gamma" in state
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    swiglu = "blocks.0.mlp.w12.weight" in state
    grid = trained
    if img_size is not None and not (img_size[0] % patch or img_size[1] % patch):
        grid = (img_size[0] // patch, img_size[1] // patch)
    if grid != trained:
        positions = resample_positions(
            state["pos_embed"], trained, grid, has_registers=registers > 0
        )
        state = state | {"pos_embed": positions}
        rows, columns = trained
        notes = [
            *notes,
            f"position embeddings resampled from {rows} x {columns} to {grid[0]} x {grid[1]} "
            "patches by the authors' rule",
        ]

    args: dict[str, Any] = {"embed_dim": dim, "depth": depth, "num_heads": dim // 64}
    if scaled or registers or swiglu:
        size = "giant" if swiglu else _DINOV2_SIZES.get((dim, depth), "small")
        name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
        if _DINOV2_SIZES.get((dim, depth)) == size:
            args = {}
        if not scaled:
            args["init_values"] = None
        if registers not in (0, 4):
            args["reg_tokens"] = registers
        usual_hidden = int(dim * 2.66667 * 2) if swiglu else 4 * dim
    else:
        name = _VIT_NAMES.get((dim, depth, patch), "vit_tiny_patch16_224")
        if (dim, depth, patch) in _VIT_NAMES:
            args = {}
        usual_hidden = 4 * dim
    if hidden not in (usual_hidden, 0):
        args["mlp_ratio"] = (hidden + 0.5) / dim  # timm rounds dim * mlp_ratio down
    if "blocks.0.attn.qkv.bias" not in state:
        args["qkv_bias"] = False
    return DinoWeights(
        name=name,
        in_chans=in_chans,
        img_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        args=args,
        state=_timm_vit_names(state),
        notes=notes,
    )


def resample_positions(
    pos_embed: Tensor, trained: tuple[int, int], grid: tuple[int, int], *, has_registers: bool
) -> Tensor:
    """Position embeddings for another grid, as the published networks themselves do it.

    DINO and DINOv2: bicubic without antialiasing, and source coordinates from the scale
    ``(n + 0.1) / n_trained`` instead of ``n / n_trained``; the 0.1 stems from a rounding problem
    of old PyTorch versions, and the published numbers contain it. DINOv2 with registers: bicubic
    with antialiasing, without the 0.1.

    Args:
        pos_embed: ``[1, 1 + rows * columns, D]``, the class token's first.
        trained: (rows, columns) it was trained for.
        grid: (rows, columns) that is wanted.
        has_registers: which of the two rules.
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:].float()
    patches = patches.unflatten(1, trained).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    if has_registers:
        resampled = F.interpolate(patches, size=grid, mode="bicubic", antialias=True)
    else:
        scale = ((grid[0] + 0.1) / trained[0], (grid[1] + 0.1) / trained[1])
        resampled = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    assert resampled.shape[2:] == grid
    return torch.cat([cls, resampled.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def _timm_vit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", key)): value
        for key, value in state.items()
    }
    if "register_tokens" in renamed:
        # timm adds positions to patches only, so the class token takes its own along.
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _block_name(key: str) -> str:
    """``blocks.CHUNK.N.rest`` to ``blocks.N.rest``; N counts through all chunks."""
    return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key)


def _grid(count: int, patch: int, img_size: tuple[int, int] | None, where: str) -> tuple[int, int]:
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    if img_size is not None:
        rows, columns = img_size[0] // patch, img_size[1] // patch
        if rows * columns == count:
            return rows, columns
    raise CheckpointError(
        f"{where}: {count} position embeddings form no square grid; give the image size "
        f"(height, width) it was trained at"
    )


def _read_resnet(state: dict[str, Tensor], where: str, notes: list[str]) -> DinoWeights:
    is_bottleneck = "layer1.0.conv3.weight" in state
    width = state["layer1.0.conv1.weight"].shape[0]
    counts = tuple(_count(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    name = _RESNET_NAMES.get((is_bottleneck, width, counts))
    if name is None:
        raise CheckpointError(
            f"{where}: a ResNet with {counts} blocks of width {width} is none of the published ones"
        )
    if name == "resnet18" and state["conv1.weight"].shape[-1] == 3:
        name = "resnet18_cifar"
    # Files of early PyTorch versions lack the counters, which no output depends on.
    for key in [k for k in state if k.endswith("running_mean")]:
        counter = key.replace("running_mean", "num_batches_tracked")
        state.setdefault(counter, torch.zeros((), dtype=torch.int64))
    size = (32, 32) if name == "resnet18_cifar" else (224, 224)
    in_chans = state["conv1.weight"].shape[1]
    return DinoWeights(name, in_chans, size, None, {}, state, notes)


def _count(keys: Iterable[str], pattern: str) -> int:
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _first_shape(state: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return next((state[name].shape[0] for name in names if name in state), 0)
