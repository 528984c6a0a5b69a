"""Score a frozen backbone by copy detection: INRIA Copydays.

    dino-kd copydetect backbone=runs/x root=/data/copydays
    dino-kd copydetect backbone=runs/x root=/data/copydays distractors=/others whiten=/more
    torchrun --nproc_per_node=4 -m eval.copydetect backbone=runs/x root=/data/copydays

Douze et al. 2009; features as in DINO (arXiv 2104.14294). docs/retrieval.md describes folders and
protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dino_kd.config import load_settings
from dino_kd.data.image_files import ImageFiles
from dino_kd.data.retrieval_sets import CopySet, read_copydays
from dino_kd.data.whole_views import Stretch
from dino_kd.distributed import is_main_process, process_group
from dino_kd.metrics.ranking import mean_scores, rank_by_similarity, score_query
from dino_kd.schema import CopydetectConfig

from .described import Describer, describe_protocol, open_describer, open_extra, whitened
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
    """`dino-kd copydetect a.b=c ...`; returns the exit code."""
    settings = load_settings(CopydetectConfig, argv, command="copydetect")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: CopydetectConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, not the official folders, images missing or broken.
    """
    watch = Stopwatch()
    output = result_path(settings, "copydetect")
    copies = read_copydays(settings.root, "root")
    describer = open_describer(
        settings, device, lambda multiple: square(settings.image_size, multiple)
    )
    more = open_extra(describer, settings.distractors, "distractors")
    extra = open_extra(describer, settings.whiten, "whiten")
    data: dict[str, Any] = {}
    notes: list[str] = []
    normalise = whitened(describer, extra, data, notes)
    queries = ImageFiles(
        [path for paths in copies.attacks.values() for path in paths],
        spec="altered copies",
        channels=describer.channels,
    )
    originals = ImageFiles(copies.originals, spec="originals", channels=describer.channels)
    asked = describer.bank(queries, "copies")
    bank = describer.bank(originals, "originals")
    data |= {
        "copies": describe_images(queries, asked),
        "originals": describe_images(originals, bank),
    }
    searched = bank.features
    if more is not None:
        others = describer.bank(more, "distractors", complete=False)
        data["distractors"] = describe_images(more, others)
        searched = torch.cat([searched, others.features])
    watch.lap("features")
    if not is_main_process():
        return {}
    metrics = dict(evaluate(copies, normalise(asked.features), normalise(searched)))
    watch.lap("ranking")
    result = make_result(
        "copydetect",
        settings,
        metrics=metrics,
        protocol=describe_protocol(describer, settings) | copy_protocol(describer, settings),
        backbone=describer.description,
        data=data,
        device=device,
        seconds=watch.seconds,
        notes=notes,
    )
    print(table(result, settings, copies))
    save_result(result, output)
    return result


def copy_protocol(describer: Describer, settings: CopydetectConfig) -> dict[str, Any]:
    """How images are shown and descriptors become numbers."""
    found = {"distance": "cosine", "average_precision": "trapezoidal, over the whole ranking"}
    if describer.backbone is None:
        return found
    side = square(settings.image_size, describer.multiple).size[0]
    return {"image_size": side, "view": "stretched to a square", **found}


def square(side: int, multiple: int) -> Stretch:
    """Stretch to a square of `side` pixels, rounded down to a multiple, one at the least."""
    side = max(multiple, side - side % multiple)
    return Stretch((side, side))


def evaluate(copies: CopySet, queries: Tensor, bank: Tensor) -> Iterator[tuple[str, float]]:
    """Yield ``("ATTACK_map", percent)``, such as ``strong_map`` and ``crops_10_map``.

    Args:
        copies: which original belongs to which copy.
        queries: unit vectors ``[Q, D]`` of all attacks' copies in order.
        bank: unit vectors ``[N, D]``: the originals, then distractors.
    """
    start = 0
    for name, positives in copies.positives.items():
        part = queries[start : start + len(positives)]
        start += len(positives)
        order = rank_by_similarity((part @ bank.T).numpy())
        mean, _, _ = mean_scores(
            [score_query(ranking, good) for ranking, good in zip(order, positives, strict=True)]
        )
        yield f"{name.replace('/', '_')}_map", 100 * mean


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows."""
    metrics = result["metrics"]
    shown = {key: value for key, value in metrics.items() if key == "strong_map"} or metrics
    return [(f"copies, {key.replace('_', ' ')} %", f"{v:.2f}") for key, v in shown.items()]


def table(result: dict[str, Any], settings: CopydetectConfig, copies: CopySet) -> str:
    """The numbers for the console."""
    lines = [
        title("Copy detection", settings, result["backbone"]),
        f"{'attack':<10}  {'copies':>6}  {'mAP %':>7}",
    ]
    for name, paths in copies.attacks.items():
        value = result["metrics"][f"{name.replace('/', '_')}_map"]
        lines.append(f"{name:<10}  {len(paths):>6,}  {value:7.2f}")
    distractors = result["data"].get("distractors", {}).get("images", 0)
    lines.append(
        f"searched among {len(copies.originals):,} originals and {distractors:,} distractors; "
        f"{features_line(result)}, ranking {result['seconds']['ranking']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
