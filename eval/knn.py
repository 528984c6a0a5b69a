"""Score a frozen backbone by weighted nearest neighbours.

    dino-kd knn backbone=runs/x train=cifar10:/data:train test=cifar10:/data:test
    python -m eval.knn backbone=pixels train=/images/train test=/images/test
    torchrun --nproc_per_node=4 -m eval.knn backbone=timm:NAME train=... test=...

Prints a table and writes a JSON file with everything needed to repeat the number. docs/evaluate.md
describes the protocol.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import dino_kd
from dino_kd import knn
from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset, labels_as, require_labels
from dino_kd.data.specs import make_dataset
from dino_kd.distributed import is_main_process, process_group, world_size
from dino_kd.engine.precision import choose_precision
from dino_kd.errors import CheckpointError, ConfigError
from dino_kd.features import FeatureBank, default_resize, extract_features, pixel_features
from dino_kd.files import write_json
from dino_kd.models.backbone import Backbone, as_size
from dino_kd.presets import loader_processes
from dino_kd.pretrained import backbone_hash, load_backbone
from dino_kd.schema import KnnConfig

PIXELS = "pixels"
_PIXEL_SIZE = 32


def main(argv: list[str]) -> int:
    """`dino-kd knn a.b=c ...`; returns the exit code."""
    settings = load_settings(KnnConfig, argv, command="knn")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: KnnConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, labels absent or of other classes, no readable image.
    """
    started = time.monotonic()
    subject = open_subject(settings, device)
    output = result_path(settings)
    train = open_images(settings, "train", subject.channels)
    test = open_images(settings, "test", subject.channels)
    require_labels(train, "train")
    assert train.class_names is not None  # it has labels
    test_labels = torch.from_numpy(labels_as(test, train.class_names, "test"))

    bank = subject.features(train)
    queries = subject.features(test)
    if not is_main_process():
        return {}
    queries.labels = test_labels[queries.indices]
    for name, features in (("train", bank.features), ("test", queries.features)):
        if not torch.isfinite(features).all():
            raise CheckpointError(
                f"backbone: {settings.backbone} gives features that are not finite on the {name} "
                "images; its weights are damaged or its training diverged"
            )
    extracted = time.monotonic()
    metrics = dict(evaluate(bank, queries, settings, device))
    result = {
        "evaluator": "knn",
        "metrics": metrics,
        "protocol": subject.protocol | neighbour_protocol(settings, len(bank.features)),
        "backbone": subject.description,
        "data": {
            "train": describe_images(train, bank),
            "test": describe_images(test, queries),
        },
        "notes": notes(settings, train, test, bank),
        "versions": versions(),
        "device": device_name(device),
        "processes": world_size(),
        "seconds": {
            "features": round(extracted - started, 2),
            "neighbours": round(time.monotonic() - extracted, 2),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    print(table(result, settings))
    if output is not None:
        write_json(output, result)
        print(f"written to {output}")
    return result


@dataclass
class Subject:
    """What is scored: a backbone, or the pixels themselves."""

    backbone: Backbone | None
    channels: int
    size: tuple[int, int]
    resize: int
    batch_size: int
    num_workers: int
    device: torch.device
    precision: str
    description: dict[str, Any]

    def features(self, dataset: ImageDataset) -> FeatureBank:
        """The features of all images of a dataset."""
        if self.backbone is None:
            return pixel_features(
                dataset,
                size=self.size,
                resize=self.resize,
                channels=self.channels,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            )
        return extract_features(
            self.backbone,
            dataset,
            size=self.size,
            resize=self.resize,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            precision=self.precision,
        )

    @property
    def protocol(self) -> dict[str, Any]:
        """How images become features."""
        return {
            "image_size": list(self.size),
            "resize": self.resize,
            "interpolation": "bicubic",
            "precision": self.precision,
        }


def open_subject(settings: KnnConfig, device: torch.device) -> Subject:
    """Load the backbone, or nothing for raw pixels. Raises UserError."""
    backbone = None
    description: dict[str, Any] = {"source": settings.backbone}
    if settings.backbone == PIXELS:
        size = as_size(settings.image_size or _PIXEL_SIZE)
        precision = "fp32"
    else:
        backbone = load_backbone(
            settings.backbone, branch=settings.branch, img_size=settings.image_size, device=device
        )
        size = backbone.img_size
        precision = choose_precision(settings.precision, device)
        description |= {
            "branch": settings.branch,
            "architecture": backbone.name,
            "model_args": backbone.model_args,
            "embed_dim": backbone.embed_dim,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "sha256": backbone_hash(backbone),
            "notes": backbone.notes,
        }
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return Subject(
        backbone=backbone,
        channels=3 if backbone is None else backbone.in_chans,
        size=size,
        resize=settings.resize or default_resize(size),
        batch_size=settings.batch_size,
        num_workers=loader_processes(settings.num_workers, per_machine),
        device=device,
        precision=precision,
        description=description,
    )


def open_images(settings: KnnConfig, name: str, channels: int) -> ImageDataset:
    """The dataset of the setting `name`. Raises UserError."""
    spec = getattr(settings, name)
    return make_dataset(spec, channels=channels, download=settings.download, where=name)


def result_path(settings: KnnConfig) -> Path | None:
    """Where the JSON goes, None for nowhere. Raises ConfigError for a folder."""
    if settings.output is not None:
        output = Path(settings.output).expanduser()
        if output.is_dir():
            raise ConfigError(f"output: {output} is a folder; give the name of a JSON file in it")
        return output
    run_dir = Path(settings.backbone).expanduser()
    if (run_dir / "config.yaml").is_file():
        return run_dir / "eval" / f"knn_{settings.branch}.json"
    return None


def evaluate(
    bank: FeatureBank, queries: FeatureBank, settings: KnnConfig, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield ``("knnK_top1", percent)`` and ``("knnK_top5", percent)`` for every k."""
    assert bank.labels is not None  # checked when the datasets were opened
    assert queries.labels is not None
    use = device if device.type == "cuda" and settings.search == "torch" else torch.device("cpu")
    accuracy = knn.knn_accuracy(
        queries.features.to(use),
        queries.labels,
        bank.features.to(use),
        bank.labels,
        ks=settings.k,
        temperature=settings.temperature,
        search={"torch": knn.search, "faiss": faiss_search}[settings.search],
    )
    for k, row in accuracy.items():
        yield f"knn{k}_top1", row["top1"]
        yield f"knn{k}_top5", row["top5"]


def faiss_search(
    queries: Tensor, bank: Tensor, k: int, *, query_chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """`dino_kd.knn.search` by faiss's exact inner-product index: the same arguments and answers.

    Holds a normalised copy of the bank in memory. Raises ConfigError when faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "search: faiss is not installed; run 'pip install faiss-cpu' or use search=torch"
        ) from None
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(F.normalize(bank.float(), dim=-1).numpy())
    found = [
        index.search(F.normalize(part.float(), dim=-1).numpy(), k)
        for part in queries.split(query_chunk)
    ]
    similarity = torch.cat([torch.from_numpy(s) for s, _ in found])  # [Q, k]
    place = torch.cat([torch.from_numpy(i) for _, i in found])  # [Q, k]
    return knn.order_ties(similarity, place)


def neighbour_protocol(settings: KnnConfig, bank_size: int) -> dict[str, Any]:
    """How neighbours become a class."""
    return {
        "k": settings.k,
        "clamped_to": {str(k): bank_size for k in settings.k if k > bank_size},
        "distance": "cosine",
        "weights": "exp(cosine / temperature)",
        "temperature": settings.temperature,
        "search": settings.search,
    }


def describe_images(dataset: ImageDataset, bank: FeatureBank) -> dict[str, Any]:
    """What was asked for, what was counted, and what was broken."""
    return {
        "spec": dataset.spec,
        "images": len(bank.features),
        "classes": len(dataset.class_names or ()),
        "broken": len(bank.broken),
        "broken_paths": [str(b) for b in bank.broken[:20]],
    }


def notes(
    settings: KnnConfig, train: ImageDataset, test: ImageDataset, bank: FeatureBank
) -> list[str]:
    """Sentences that a reader of the numbers should see."""
    found = []
    clamped = [k for k in settings.k if k > len(bank.features)]
    if clamped:
        found.append(
            f"only {len(bank.features)} images vote, fewer than k = "
            f"{', '.join(map(str, clamped))}: all of them vote there"
        )
    both = len(
        {test.path(i) for i in range(len(test))} & {train.path(i) for i in range(len(train))}
    )
    if both:
        found.append(f"{both} of {len(test)} test images are also in train: the score flatters")
    untested = sorted(set(train.class_names or ()) - set(test.class_names or ()))
    if untested:
        shown = ", ".join(untested[:5]) + (" ..." if len(untested) > 5 else "")
        found.append(f"{len(untested)} classes of train have no test image: {shown}")
    return found


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


def table(result: dict[str, Any], settings: KnnConfig) -> str:
    """The numbers for the console."""
    data, seconds, metrics = result["data"], result["seconds"], result["metrics"]
    subject = settings.backbone
    if "architecture" in result["backbone"]:
        subject += f" ({settings.branch}, {result['backbone']['architecture']})"
    lines = [f"k-NN of {subject}", f"{'k':>5}  {'top-1 %':>8}  {'top-5 %':>8}"]
    for k in dict.fromkeys(settings.k):
        lines.append(f"{k:>5}  {metrics[f'knn{k}_top1']:8.2f}  {metrics[f'knn{k}_top5']:8.2f}")
    lines.append(
        f"{data['test']['images']:,} test images, {data['train']['images']:,} vote, "
        f"{data['train']['classes']} classes; features {seconds['features']:.1f} s, "
        f"neighbours {seconds['neighbours']:.1f} s"
    )
    for name in ("train", "test"):
        if data[name]["broken"]:
            lines.append(
                f"{data[name]['broken']} broken {name} images left out, such as "
                f"{data[name]['broken_paths'][0]}"
            )
    lines += [f"note: {note}" for note in result["notes"] + result["backbone"].get("notes", [])]
    return "\n".join(lines)


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
