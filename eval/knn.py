"""Score a frozen backbone by weighted nearest neighbours.

    dino-kd knn backbone=runs/x train=cifar10:/data:train test=cifar10:/data:test
    python -m eval.knn backbone=pixels train=/images/train test=/images/test
    torchrun --nproc_per_node=4 -m eval.knn backbone=timm:NAME train=... test=...

Prints a table and writes a JSON file with everything needed to repeat the number. docs/evaluate.md
describes the protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd import knn
from dino_kd.config import load_settings
from dino_kd.data.dataset import labels_as, require_labels
from dino_kd.distributed import is_main_process, process_group
from dino_kd.errors import ConfigError
from dino_kd.features import FeatureBank
from dino_kd.schema import KnnConfig

from .results import (
    Stopwatch,
    closing_lines,
    describe_images,
    features_line,
    make_result,
    notes_on_sets,
    result_path,
    save_result,
    title,
)
from .subject import open_images, open_subject


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
    watch = Stopwatch()
    output = result_path(settings, "knn")
    subject = open_subject(settings, device)
    train = open_images(settings, "train", subject.channels)
    test = open_images(settings, "test", subject.channels)
    require_labels(train, "train")
    assert train.class_names is not None  # it has labels
    test_labels = torch.from_numpy(labels_as(test, train.class_names, "test"))
    bank = subject.features(train, "train")
    queries = subject.features(test, "test")
    if not is_main_process():
        return {}
    queries.labels = test_labels[queries.indices]
    watch.lap("features")
    metrics = dict(evaluate(bank, queries, settings, device))
    watch.lap("neighbours")
    result = make_result(
        "knn",
        settings,
        metrics=metrics,
        protocol=subject.protocol | neighbour_protocol(settings, len(bank.features)),
        backbone=subject.description,
        data={"train": describe_images(train, bank), "test": describe_images(test, queries)},
        device=device,
        seconds=watch.seconds,
        notes=[*clamped_note(settings, bank), *notes_on_sets(train, test)],
    )
    print(table(result, settings))
    save_result(result, output)
    return result


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


def clamped_note(settings: KnnConfig, bank: FeatureBank) -> list[str]:
    """The sentence about every k that is larger than the bank, if any."""
    clamped = [k for k in settings.k if k > len(bank.features)]
    if not clamped:
        return []
    return [
        f"only {len(bank.features)} images vote, fewer than k = "
        f"{', '.join(map(str, clamped))}: all of them vote there"
    ]


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows: the score at k = 20, or at the k nearest to it."""
    nearest = min(result["protocol"]["k"], key=lambda k: abs(k - 20))
    return [(f"k-NN top-1 %, k = {nearest}", f"{result['metrics'][f'knn{nearest}_top1']:.2f}")]


def table(result: dict[str, Any], settings: KnnConfig) -> str:
    """The numbers for the console."""
    data, seconds, metrics = result["data"], result["seconds"], result["metrics"]
    lines = [
        title("k-NN", settings, result["backbone"]),
        f"{'k':>5}  {'top-1 %':>8}  {'top-5 %':>8}",
    ]
    for k in dict.fromkeys(settings.k):
        lines.append(f"{k:>5}  {metrics[f'knn{k}_top1']:8.2f}  {metrics[f'knn{k}_top5']:8.2f}")
    lines.append(
        f"{data['test']['images']:,} test images, {data['train']['images']:,} vote, "
        f"{data['train']['classes']} classes; {features_line(result)}, "
        f"neighbours {seconds['neighbours']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
