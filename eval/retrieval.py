"""Score a frozen backbone by landmark retrieval: revisited Oxford and Paris.

    dino-kd retrieval backbone=runs/x root=/data/revisited
    python -m eval.retrieval backbone=timm:NAME root=/data/revisited dataset=roxford5k
    torchrun --nproc_per_node=4 -m eval.retrieval backbone=runs/x root=/data/revisited

Radenovic et al. 2018 (arXiv 1803.11285). docs/retrieval.md describes folders and protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from dino_kd.config import load_settings
from dino_kd.data.image_files import ImageFiles
from dino_kd.data.retrieval_sets import PROTOCOLS, RevisitedSet, find_revisited, read_revisited
from dino_kd.data.whole_views import FitWithin
from dino_kd.descriptors import DINO_SCALES
from dino_kd.distributed import is_main_process, process_group
from dino_kd.metrics.ranking import mean_scores, rank_by_similarity, score_query
from dino_kd.schema import RetrievalConfig

from .described import describe_protocol, open_describer, open_extra, whitened
from .results import (
    Stopwatch,
    closing_lines,
    describe_images,
    features_line,
    make_result,
    result_path,
    save_result,
    title,
)


def main(argv: list[str]) -> int:
    """`dino-kd retrieval a.b=c ...`; returns the exit code."""
    settings = load_settings(RetrievalConfig, argv, command="retrieval")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: RetrievalConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, not the official folders, images missing or broken.
    """
    watch = Stopwatch()
    output = result_path(settings, "retrieval")
    names: list[str] = (
        find_revisited(settings.root, "root") if settings.dataset == "auto" else [settings.dataset]
    )
    sets = [read_revisited(settings.root, name, "root") for name in names]
    describer = open_describer(
        settings,
        device,
        lambda multiple: FitWithin(settings.image_size, multiple),
        DINO_SCALES if settings.multiscale else (1.0,),
    )
    extra = open_extra(describer, settings.whiten, "whiten")
    data: dict[str, Any] = {}
    notes = [] if settings.crop_queries else ["queries are whole images, not cut to their boxes"]
    normalise = whitened(describer, extra, data, notes)
    metrics: dict[str, float] = {}
    for one in sets:
        images = ImageFiles(one.images, spec=f"{one.name} images", channels=describer.channels)
        queries = ImageFiles(
            one.queries,
            spec=f"{one.name} queries",
            channels=describer.channels,
            boxes=one.boxes if settings.crop_queries else None,
        )
        bank = describer.bank(images, f"{one.name} images")
        asked = describer.bank(queries, f"{one.name} queries")
        watch.lap("features")
        if not is_main_process():
            continue
        similarity = normalise(asked.features) @ normalise(bank.features).T  # [Q, N]
        metrics |= dict(evaluate(one, similarity, settings, notes))
        watch.lap("ranking")
        data[f"{one.name} images"] = describe_images(images, bank)
        data[f"{one.name} queries"] = describe_images(queries, asked)
    if not is_main_process():
        return {}
    result = make_result(
        "retrieval",
        settings,
        metrics=metrics,
        protocol=describe_protocol(describer, settings) | retrieval_protocol(settings),
        backbone=describer.description,
        data=data,
        device=device,
        seconds=watch.seconds,
        notes=notes,
    )
    print(table(result, settings, names))
    save_result(result, output)
    return result


def evaluate(
    one: RevisitedSet, similarity: torch.Tensor, settings: RetrievalConfig, notes: list[str]
) -> Iterator[tuple[str, float]]:
    """Yield ``("SET_PROTOCOL_map", percent)`` and ``("SET_PROTOCOL_mpK", percent)``.

    A protocol without any query to score yields nothing and leaves a sentence in `notes`.

    Args:
        one: what should be found.
        similarity: float32 ``[Q, N]`` of every query to every image.
        settings: for `k`.
        notes: where sentences go.
    """
    order = rank_by_similarity(similarity.numpy())  # [Q, N]
    for protocol in PROTOCOLS:
        scores = [
            score_query(order[q], *one.positives_and_ignored(q, protocol), ks=settings.k)
            for q in range(len(order))
        ]
        mean, precisions, counted = mean_scores(scores)
        if counted < len(scores):
            notes.append(
                f"{one.name} {protocol}: {len(scores) - counted} of {len(scores)} queries have "
                "nothing to find there and do not count"
            )
        if not counted:
            continue
        yield f"{one.name}_{protocol}_map", 100 * mean
        for k, value in zip(settings.k, precisions, strict=True):
            yield f"{one.name}_{protocol}_mp{k}", 100 * value


def retrieval_protocol(settings: RetrievalConfig) -> dict[str, Any]:
    """How descriptors become numbers."""
    return {
        "queries": "cut to their boxes" if settings.crop_queries else "whole",
        "distance": "cosine",
        "average_precision": "trapezoidal",
        "k": settings.k,
        "protocols": {
            name: {"found": list(positives), "ignored": list(ignored)}
            for name, (positives, ignored) in PROTOCOLS.items()
        },
    }


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows."""
    maps = {key: value for key, value in result["metrics"].items() if key.endswith("_map")}
    return [(key.replace("_", " ").replace("map", "mAP %"), f"{v:.2f}") for key, v in maps.items()]


def table(result: dict[str, Any], settings: RetrievalConfig, names: list[str]) -> str:
    """The numbers for the console."""
    metrics, ks = result["metrics"], list(dict.fromkeys(settings.k))
    lines = [
        title("Retrieval", settings, result["backbone"]),
        f"{'set':<10} {'protocol':<8}  {'mAP %':>7}" + "".join(f"  {f'mP@{k} %':>8}" for k in ks),
    ]
    for name in names:
        for protocol in PROTOCOLS:
            keys = [f"{name}_{protocol}_map", *(f"{name}_{protocol}_mp{k}" for k in ks)]
            values = [f"{metrics[key]:.2f}" if key in metrics else "-" for key in keys]
            lines.append(
                f"{name:<10} {protocol:<8}  {values[0]:>7}"
                + "".join(f"  {value:>8}" for value in values[1:])
            )
        images, queries = (result["data"][f"{name} {part}"] for part in ("images", "queries"))
        lines.append(f"{name}: {queries['images']:,} queries in {images['images']:,} images")
    lines.append(f"{features_line(result)}, ranking {result['seconds']['ranking']:.1f} s")
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
