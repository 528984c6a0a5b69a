"""What every evaluator writes: its numbers, and everything that is needed to repeat them."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import dino_kd
from dino_kd.data.dataset import ImageDataset, notes_on_shared_images
from dino_kd.distributed import world_size
from dino_kd.errors import ConfigError
from dino_kd.features import FeatureBank
from dino_kd.files import write_json
from dino_kd.schema import Settings, SourceSettings


class Stopwatch:
    """Seconds of the parts of an evaluation, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 2)
        self._last = now


def make_result(
    evaluator: str,
    settings: Settings,
    *,
    metrics: dict[str, Any],
    protocol: dict[str, Any],
    backbone: dict[str, Any],
    data: dict[str, Any],
    device: torch.device,
    seconds: dict[str, float],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The result as it is written to JSON: numbers first, then where they came from."""
    return {
        "evaluator": evaluator,
        "metrics": metrics,
        "protocol": protocol,
        "backbone": backbone,
        "data": data,
        "notes": list(notes),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "device": device_name(device),
        "processes": world_size(),
        "seconds": seconds,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def save_result(result: dict[str, Any], output: Path | None) -> None:
    """Write the JSON, when it goes anywhere, and say where."""
    if output is not None:
        write_json(output, result)
        print(f"written to {output}")


def result_path(settings: Any, evaluator: str, suffix: str = ".json") -> Path | None:
    """Where a result goes: `output`, else the run directory's eval/, else None for nowhere.

    Raises ConfigError when `output` is a folder.
    """
    if settings.output is not None:
        output = Path(settings.output).expanduser()
        if output.is_dir():
            raise ConfigError(
                f"output: {output} is a folder; give the name of a {suffix} file in it"
            )
        return output
    run_dir = Path(settings.backbone).expanduser()
    if (run_dir / "config.yaml").is_file():
        return run_dir / "eval" / f"{evaluator}_{settings.branch}{suffix}"
    return None


def describe_images(dataset: ImageDataset, bank: FeatureBank) -> dict[str, Any]:
    """What was asked for, what was counted, and what was broken."""
    return {
        "spec": dataset.spec,
        "images": len(bank.features),
        "classes": len(dataset.class_names or ()),
        "broken": len(bank.broken),
        "broken_paths": [str(b) for b in bank.broken[:20]],
        "cached": bank.cached,
    }


def notes_on_sets(train: ImageDataset, test: ImageDataset) -> list[str]:
    """Sentences about a pair of sets that a reader of the numbers should see."""
    found = notes_on_shared_images(train, test)
    untested = sorted(set(train.class_names or ()) - set(test.class_names or ()))
    if untested:
        shown = ", ".join(untested[:5]) + (" ..." if len(untested) > 5 else "")
        found.append(f"{len(untested)} classes of train have no test image: {shown}")
    return found


def title(evaluator: str, settings: SourceSettings, backbone: dict[str, Any]) -> str:
    """The first line of a table, such as "k-NN of runs/x (teacher, resnet18)"."""
    if "architecture" not in backbone:
        return f"{evaluator} of {settings.backbone}"
    return f"{evaluator} of {settings.backbone} ({settings.branch}, {backbone['architecture']})"


def closing_lines(result: dict[str, Any]) -> list[str]:
    """The last lines of a table: images that were left out, and notes."""
    lines = []
    for name, images in result["data"].items():
        if images.get("broken"):
            lines.append(
                f"{images['broken']} broken {name} images left out, such as "
                f"{images['broken_paths'][0]}"
            )
    lines += [f"note: {note}" for note in result["notes"] + result["backbone"].get("notes", [])]
    return lines


def features_line(result: dict[str, Any]) -> str:
    """Where the features came from, such as "features 3.1 s (train from the cache)"."""
    kept = [name for name, images in result["data"].items() if images.get("cached")]
    origin = f" ({' and '.join(kept)} from the cache)" if kept else ""
    return f"features {result['seconds'].get('features', 0.0):.1f} s{origin}"


def versions() -> dict[str, str]:
    """Of everything that computes."""
    return {
        "dino_kd": dino_kd.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Such as "cuda:0 (NVIDIA H100)"."""
    return (
        f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    )
