"""The classifier beside a trained backbone, as one file: written and read here alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dino_kd.errors import CheckpointError
from dino_kd.files import write_tensors

CLASSIFIER_FILE = "classifier.safetensors"  # in a run directory
_TOKEN = "token_"


def write_classifier(
    run_dir: Path,
    class_names: Sequence[str] | None,
    classifier: nn.Linear,
    token_classifier: nn.Linear | None = None,
) -> None:
    """``weight`` ``[Y, D]`` and ``bias`` ``[Y]``; ``token_weight`` and ``token_bias`` likewise.

    The names of the classes stand in the header, under ``classes``, as a JSON list. Atomic; raises
    UserError when the disk is full.
    """
    tensors = classifier.state_dict()
    if token_classifier is not None:
        token = token_classifier.state_dict()
        tensors |= {f"{_TOKEN}{name}": values for name, values in token.items()}
    write_tensors(run_dir / CLASSIFIER_FILE, tensors, {"classes": json.dumps(class_names)})


def read_classifier(path: Path) -> tuple[list[str] | None, dict[str, Tensor]]:
    """The class names and the tensors. Raises CheckpointError when the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {}).get("classes", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no classifier ({error})") from error
    if not {"weight", "bias"} <= tensors.keys():
        raise CheckpointError(f"{path} is no classifier: it holds {', '.join(sorted(tensors))}")
    return names, tensors


def of_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the distillation token's classifier; empty when there is none."""
    return {n.removeprefix(_TOKEN): v for n, v in tensors.items() if n.startswith(_TOKEN)}
