"""Score a frozen backbone by weighted nearest neighbours.

    dino-kd knn backbone=runs/x train=cifar10:/data:train test=cifar10:/data:test
    python -m eval.knn backbone=pixels train=/images/train test=/images/test
    python -m eval.knn backbone=runs/x train=/images leave_one_out=true
    torchrun --nproc_per_node=4 -m eval.knn backbone=timm:NAME train=... test=...

Prints a table and writes a JSON file with everything needed to repeat the number. docs/evaluate.md
describes the protocol.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd import knn
from dino_kd.config import load_settings
from dino_kd.data.dataset import (
    ImageDataset,
    labels_as,
    notes_on_shared_images,
    require_labels,
)
from dino_kd.data.splits import class_orders
from dino_kd.distributed import is_main_process, process_group
from dino_kd.errors import ConfigError, DataError
from dino_kd.features import FeatureBank
from dino_kd.schema import KnnConfig

from . import multilabel
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


@dataclass
class Sets:
    """The images that vote and the images that are scored: the same ones for leave-one-out.

    Labels are int64 ``[N]``, or bool ``[N, L]`` where `names` are those of a label file.
    """

    train: ImageDataset
    train_labels: Tensor
    test: ImageDataset
    test_labels: Tensor
    names: list[str]


def result_name(settings: KnnConfig) -> str:
    """A file name for each protocol, so that one score in a run never replaces another's."""
    modes = {
        "leave_one_out": settings.leave_one_out,
        f"per_class{settings.per_class}": settings.per_class is not None,
        "labels": settings.labels is not None,
    }
    return "_".join(["knn", *(name for name, is_on in modes.items() if is_on)])


def score(settings: KnnConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, labels absent or of other classes, no readable image, a class
            with fewer images than `per_class`.
    """
    watch = Stopwatch()
    output = result_path(settings, result_name(settings))
    subject = open_subject(settings, device)
    sets = open_sets(settings, subject.channels)
    check_per_class(sets.train_labels, sets.names, settings, "images")
    bank = subject.features(sets.train, "train")
    queries = bank if settings.leave_one_out else subject.features(sets.test, "test")
    bank_labels, query_labels = sets.train_labels[bank.indices], sets.test_labels[queries.indices]
    # again, and on every process: broken images have no features
    check_per_class(bank_labels, sets.names, settings, "readable images")
    if settings.leave_one_out and len(bank.features) < 2:
        raise DataError(f"train: {sets.train.spec} has 1 readable image; the others of it vote")
    if not query_labels.any() and settings.labels is not None:
        raise DataError(f"labels: {settings.labels} gives no label to any image that is scored")
    if not is_main_process():
        return {}
    watch.lap("features")
    metrics = dict(evaluate(bank, bank_labels, queries, query_labels, settings, device))
    watch.lap("neighbours")
    voting = len(bank.features) - settings.leave_one_out
    if settings.per_class is not None:
        voting = settings.per_class * len(sets.names)
    data = {"train": describe_images(sets.train, bank)}
    if not settings.leave_one_out:
        data["test"] = describe_images(sets.test, queries)
    result = make_result(
        "knn",
        settings,
        metrics=metrics,
        protocol=subject.protocol | neighbour_protocol(settings, voting, len(sets.names)),
        backbone=subject.description,
        data=data,
        device=device,
        seconds=watch.seconds,
        notes=[
            *clamped_note(settings, voting),
            *notes(settings, sets, bank_labels, query_labels),
        ],
    )
    print(table(result, settings))
    save_result(result, output)
    return result


def open_sets(settings: KnnConfig, channels: int) -> Sets:
    """Open and check the images and their labels. Raises UserError."""
    file = None if settings.labels is None else multilabel.read_labels(settings.labels)
    train = open_images(settings, "train", channels)
    test = train if settings.leave_one_out else open_images(settings, "test", channels)
    if file is not None:
        labels = file.matrix(train, "train")
        test_labels = labels if settings.leave_one_out else file.matrix(test, "test")
        return Sets(train, labels, test, test_labels, file.names)
    require_labels(train, "train")
    assert train.labels is not None and train.class_names is not None  # noqa: PT018 - it has labels
    test_labels = torch.from_numpy(labels_as(test, train.class_names, "test"))
    return Sets(train, torch.from_numpy(train.labels), test, test_labels, train.class_names)


def check_per_class(labels: Tensor, names: list[str], settings: KnnConfig, what: str) -> None:
    """Raise DataError when a class has fewer images than `per_class`."""
    if settings.per_class is None:
        return
    counts = np.bincount(labels.numpy(), minlength=len(names))
    smallest = int(counts.argmin())
    if counts[smallest] < settings.per_class:
        short = int((counts < settings.per_class).sum())
        others = f", and {short - 1} more of the classes have too few" if short > 1 else ""
        raise DataError(
            f"per_class: {settings.per_class} images of each class were asked for, but class "
            f"{names[smallest]!r} has {counts[smallest]} {what} in train{others}; use "
            f"per_class of at most {counts[smallest]}, or add images"
        )


def evaluate(
    bank: FeatureBank,
    bank_labels: Tensor,
    queries: FeatureBank,
    query_labels: Tensor,
    settings: KnnConfig,
    device: torch.device,
) -> Iterator[tuple[str, float | None]]:
    """Yield ``("knnK_top1", percent)`` and ``("knnK_top5", percent)`` for every k.

    With `per_class` these are means over the draws, and ``_sd`` their standard deviation (None
    for one draw); with a label file ``knnK_map`` and ``knnK_micro_f1`` stand instead.
    """
    use = device if device.type == "cuda" and settings.search == "torch" else torch.device("cpu")
    features, voting = queries.features.to(use), bank.features.to(use)
    if settings.labels is not None:
        similarity, index = neighbours(features, voting, settings)
        used = {k: min(k, similarity.shape[1]) for k in settings.k}
        found = knn.label_scores(
            similarity, index, bank_labels, list(used.values()), settings.temperature
        )
        yield from multilabel.evaluate({k: found[n] for k, n in used.items()}, query_labels)
        return
    draws = []
    for rows in drawn_rows(bank_labels, settings):
        near = neighbours(features, voting if rows is None else voting[rows.to(use)], settings)
        labels = bank_labels if rows is None else bank_labels[rows]
        draws.append(
            knn.vote_accuracy(
                *near, query_labels, labels, ks=settings.k, temperature=settings.temperature
            )
        )
    for k in dict.fromkeys(settings.k):
        for name in ("top1", "top5"):
            values = [draw[k][name] for draw in draws]
            yield f"knn{k}_{name}", statistics.fmean(values)
            if settings.per_class is not None:
                yield f"knn{k}_{name}_sd", statistics.stdev(values) if len(values) > 1 else None


def neighbours(queries: Tensor, bank: Tensor, settings: KnnConfig) -> tuple[Tensor, Tensor]:
    """Similarity and index ``[Q, K]`` for the largest k that the bank allows."""
    search = {"torch": knn.search, "faiss": faiss_search}[settings.search]
    if settings.leave_one_out:
        return knn.search_others(bank, min(max(settings.k), len(bank) - 1), search=search)
    return search(queries, bank, min(max(settings.k), len(bank)))


def drawn_rows(labels: Tensor, settings: KnnConfig) -> Iterator[Tensor | None]:
    """The rows of the bank that vote, ascending, for every draw; one None for all of them."""
    if settings.per_class is None:
        yield None
        return
    for seed in range(settings.seed, settings.seed + settings.draws):
        orders = class_orders(labels.numpy(), seed)
        rows = np.concatenate([order[: settings.per_class] for order in orders])
        yield torch.from_numpy(np.sort(rows))


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


def neighbour_protocol(settings: KnnConfig, voting: int, num_names: int) -> dict[str, Any]:
    """How neighbours become a class; of `voting` images and classes or labels `num_names`."""
    protocol: dict[str, Any] = {
        "k": settings.k,
        "clamped_to": {str(k): voting for k in settings.k if k > voting},
        "distance": "cosine",
        "weights": "exp(cosine / temperature)",
        "temperature": settings.temperature,
        "search": settings.search,
    }
    if settings.leave_one_out:
        protocol["leave_one_out"] = True
    if settings.per_class is not None:
        protocol |= {
            "per_class": settings.per_class,
            "draws": settings.draws,
            "seeds": [settings.seed, settings.seed + settings.draws - 1],
        }
    if settings.labels is not None:
        protocol |= {"labels": num_names, "threshold": multilabel.THRESHOLD}
    return protocol


def clamped_note(settings: KnnConfig, voting: int) -> list[str]:
    """The sentence about every k that is larger than the number of voting images, if any."""
    clamped = [k for k in settings.k if k > voting]
    if not clamped:
        return []
    return [
        f"only {voting} images vote, fewer than k = "
        f"{', '.join(map(str, clamped))}: all of them vote there"
    ]


def notes(settings: KnnConfig, sets: Sets, bank_labels: Tensor, query_labels: Tensor) -> list[str]:
    """Sentences about the images and labels that a reader of the numbers should see."""
    if settings.labels is not None:
        shared = [] if settings.leave_one_out else notes_on_shared_images(sets.train, sets.test)
        return shared + multilabel.notes_on_labels(sets.names, bank_labels, query_labels)
    if not settings.leave_one_out:
        return notes_on_sets(sets.train, sets.test)
    counts = torch.bincount(bank_labels, minlength=len(sets.names))
    single = [name for name, n in zip(sets.names, counts.tolist(), strict=True) if n == 1]
    if not single:
        return []
    shown = ", ".join(single[:5]) + (" ..." if len(single) > 5 else "")
    return [f"{len(single)} classes have one image, which is never right: {shown}"]


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows: the score at k = 20, or at the k nearest to it."""
    protocol, metrics = result["protocol"], result["metrics"]
    nearest = min(protocol["k"], key=lambda k: abs(k - 20))
    key, name = ("map", "mAP") if "labels" in protocol else ("top1", "top-1")
    title, number = f"k-NN {name} %, k = {nearest}", f"{metrics[f'knn{nearest}_{key}']:.2f}"
    if "per_class" in protocol:
        title += f", {protocol['per_class']} per class"
        deviation = metrics[f"knn{nearest}_{key}_sd"]
        number += "" if deviation is None else f" (sd {deviation:.2f})"
    if "leave_one_out" in protocol:
        title += ", leave one out"
    return [(title, number)]


def table(result: dict[str, Any], settings: KnnConfig) -> str:
    """The numbers for the console."""
    data, protocol, metrics = result["data"], result["protocol"], result["metrics"]
    columns = {"top1": "top-1 %", "top5": "top-5 %"}
    if settings.per_class is not None:
        columns = {"top1": "top-1 %", "top1_sd": "sd", "top5": "top-5 %", "top5_sd": "sd"}
    if settings.labels is not None:
        columns = {"map": "mAP %", "micro_f1": "F1 %"}
    lines = [
        title("k-NN", settings, result["backbone"]),
        f"{'k':>5}" + "".join(f"  {words:>8}" for words in columns.values()),
    ]
    for k in dict.fromkeys(settings.k):
        values = [metrics[f"knn{k}_{name}"] for name in columns]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{k:>5}" + "".join(f"  {cell:>8}" for cell in cells))
    images = f"{data['train']['images']:,}"
    if settings.leave_one_out:
        counts = f"{images} images, each scored by the others"
    elif settings.per_class is not None:
        counts = (
            f"{data['test']['images']:,} test images, {settings.per_class} per class of {images} "
            f"vote, draws: {settings.draws}"
        )
    else:
        counts = f"{data['test']['images']:,} test images, {images} vote"
    kinds = f"{protocol['labels']} labels" if "labels" in protocol else ""
    lines.append(
        f"{counts}, {kinds or str(data['train']['classes']) + ' classes'}; "
        f"{features_line(result)}, neighbours {result['seconds']['neighbours']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
