"""A trained linear classifier on a frozen backbone: what the linear probe leaves behind.

One safetensors file with the weights and, as text beside them, everything that must fit: parts of
the backbone's features, class names, the backbone's hash, how its images were prepared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dino_kd.errors import CheckpointError
from dino_kd.files import write_tensors
from dino_kd.models.backbone import Backbone

_FORMAT = 1
_KEY = "linear_head"


@dataclass(frozen=True)
class HeadOrigin:
    """Which features a head was trained on.

    Attributes:
        backbone: the source it was loaded from, for people.
        sha256: `backbone_hash` of its weights; empty for the pixels themselves.
        image_size: (height, width) in pixels.
        mean, std: of the normalisation, per channel in 0..1; empty for pixels.
    """

    backbone: str
    sha256: str
    image_size: tuple[int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def fraction_name(fraction: float) -> str:
    """What marks files of a classifier that has seen a part of the labels: ``_fraction0.1``."""
    return "" if fraction == 1 else f"_fraction{fraction:g}"


def head_file(branch: str, fraction: float = 1.0) -> str:
    """The name of a head in the eval/ folder of a run directory."""
    return f"linear_head{fraction_name(fraction)}_{branch}.safetensors"


class LinearHead(nn.Module):
    """Logits from the features of a backbone.

    Args:
        parts: names as in `Backbone.parts`, in the order in which they are concatenated.
        widths: columns of each part.
        class_names: the name of each of the Y classes.
        origin: the features it belongs to.
    """

    def __init__(
        self,
        parts: Sequence[str],
        widths: Sequence[int],
        class_names: Sequence[str],
        origin: HeadOrigin,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.widths = tuple(widths)
        self.class_names = list(class_names)
        self.origin = origin
        self.linear = nn.Linear(sum(widths), len(class_names))

    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[N, Y]`` from what `Backbone.parts` returns for `self.parts`."""
        return self.linear(torch.cat([parts[name] for name in self.parts], dim=1))


def save_linear_head(head: LinearHead, path: str | Path) -> None:
    """Write one file, atomically. Raises UserError when the disk is full or not writable."""
    about = {
        "format": _FORMAT,
        "parts": head.parts,
        "widths": head.widths,
        "class_names": head.class_names,
        "origin": asdict(head.origin),
    }
    tensors = {"weight": head.linear.weight, "bias": head.linear.bias}
    write_tensors(path, tensors, {_KEY: json.dumps(about)})


def load_linear_head(path: str | Path) -> LinearHead:
    """Read a head back, in eval mode and on the CPU; `check_head` compares it with a backbone.

    Raises:
        CheckpointError: no such file, damaged, no linear head, or its parts contradict each other.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"no linear head at {path}; 'dino-kd linear backbone=RUN_DIR' writes "
            "RUN_DIR/eval/linear_head_BRANCH.safetensors"
        )
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error})") from error
    if text is None:
        raise CheckpointError(
            f"{path} is no linear head: it lacks the description that 'dino-kd linear' writes"
        )
    head = _described(text, path)
    expected = {name: tuple(values.shape) for name, values in head.linear.state_dict().items()}
    found = {name: tuple(values.shape) for name, values in tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"{path} contradicts itself: its description asks for {expected}, it holds {found}"
        )
    if any(not values.isfinite().all() for values in tensors.values()):
        raise CheckpointError(f"{path} holds values that are not finite")
    head.linear.load_state_dict(tensors)
    return head.eval()


def check_head(
    head: LinearHead, backbone: Backbone, sha256: str | None, *, other_weights: bool = False
) -> list[str]:
    """Refuse a backbone that `head` was not trained on; sentences about smaller differences.

    Runs one black image through the backbone to learn its widths.

    Args:
        head: as loaded.
        backbone: whose parts the head is to read.
        sha256: its `backbone_hash`; None: do not compare weights.
        other_weights: note other weights of the same widths instead of refusing them.

    Raises:
        CheckpointError: a part of another width, or other weights.
    """
    found = _widths(backbone, head.parts)
    expected = dict(zip(head.parts, head.widths, strict=True))
    if found != expected:
        raise CheckpointError(
            f"the linear head was trained on features of {head.origin.backbone} with "
            f"{_listed(expected)} columns; {backbone.name} gives {_listed(found)}"
        )
    notes = []
    if sha256 is not None and sha256 != head.origin.sha256:
        words = (
            f"the linear head was trained on other weights: {head.origin.backbone}, SHA-256 "
            f"{head.origin.sha256[:12] or 'none'}; this {backbone.name} has {sha256[:12]}"
        )
        if not other_weights:
            raise CheckpointError(f"{words}. Train a head for it with 'dino-kd linear'")
        notes.append(words)
    if backbone.img_size != head.origin.image_size:
        notes.append(
            f"the linear head was trained at {_size(head.origin.image_size)} px, "
            f"the backbone runs at {_size(backbone.img_size)} px"
        )
    if (tuple(backbone.mean), tuple(backbone.std)) != (head.origin.mean, head.origin.std):
        notes.append(
            f"the linear head was trained with mean {list(head.origin.mean)} and std "
            f"{list(head.origin.std)}, the backbone uses {list(backbone.mean)} and "
            f"{list(backbone.std)}"
        )
    return notes


def _described(text: str, path: Path) -> LinearHead:
    """An empty head of the described shape."""
    try:
        about = json.loads(text)
        if about["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {about['format']}; this version reads format {_FORMAT}"
            )
        return LinearHead(
            about["parts"], about["widths"], about["class_names"], _origin(about["origin"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the description in {path} is damaged ({error!r})") from error


def _origin(values: dict[str, Any]) -> HeadOrigin:
    height, width = values["image_size"]
    return HeadOrigin(
        backbone=values["backbone"],
        sha256=values["sha256"],
        image_size=(height, width),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )


@torch.no_grad()
def _widths(backbone: Backbone, parts: Sequence[str]) -> dict[str, int]:
    device = next(backbone.parameters()).device
    black = torch.zeros(1, backbone.in_chans, *backbone.img_size, dtype=torch.uint8, device=device)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        made = backbone.parts(backbone.preprocess(black), parts)
    finally:
        for module, training in modes:
            module.training = training
    return {name: values.shape[1] for name, values in made.items()}


def _listed(widths: Mapping[str, int]) -> str:
    return " + ".join(f"{name} {width}" for name, width in widths.items())


def _size(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
