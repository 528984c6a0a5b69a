"""Find near-duplicate images within a set, and images of `test` that `train` holds too.

    dino-kd duplicates backbone=pixels train=/images output=duplicates.json
    python -m eval.duplicates backbone=runs/x train=/images/train test=/images/test
    torchrun --nproc_per_node=4 -m eval.duplicates backbone=runs/x train=... test=...

Beside the JSON it writes the pairs as CSV, a picture of the worst groups, and a list of the
training images to keep, which is a dataset spec. docs/embed.md says how pairs are found.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.thumbnails import Thumbnails, make_thumbnails
from dino_kd.distributed import is_main_process, process_group, world_size
from dino_kd.duplicates import appearance, same_rows
from dino_kd.features import FeatureBank
from dino_kd.knn import search
from dino_kd.schema import DuplicatesConfig

from .duplicate_groups import Findings, Pictures, judge, write_findings
from .results import (
    Stopwatch,
    closing_lines,
    describe_images,
    features_line,
    make_result,
    result_path,
    save_result,
)
from .subject import Subject, open_images, open_subject


def main(argv: list[str]) -> int:
    """`dino-kd duplicates a.b=c ...`; returns the exit code."""
    settings = load_settings(DuplicatesConfig, argv, command="duplicates")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: DuplicatesConfig, device: torch.device) -> dict[str, Any]:
    """Find duplicates; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, no readable image, a disk that is full.
    """
    watch = Stopwatch()
    output = result_path(settings, "duplicates")
    subject = open_subject(settings, device)
    names = ["train"] if settings.test is None else ["train", "test"]
    sets = {name: open_images(settings, name, subject.channels) for name in names}
    banks = {name: subject.features(sets[name], name) for name in names}
    watch.lap("features")
    thumbnails = {name: look(subject, sets[name], name) for name in names}
    watch.lap("pictures")
    if not is_main_process():
        return {}
    pictures, features = assemble(sets, banks, thumbnails)
    first = same_rows(pictures.hashes)
    pairs, scores, looked_at = near_pairs(features, pictures, first, settings)
    findings = judge(pictures, first, pairs, scores)
    watch.lap("pairs")
    result = make_result(
        "duplicates",
        settings,
        metrics=findings.metrics,
        protocol=subject.protocol | pair_protocol(settings, looked_at),
        backbone=subject.description,
        data={name: describe_images(sets[name], banks[name]) for name in names},
        device=device,
        seconds=watch.seconds,
        notes=notes_on(settings, findings),
    )
    result["groups"] = findings.describe_groups()
    written = [] if output is None else write_findings(findings, sets, output, result["notes"])
    print(table(result))
    for line in written:
        print(line)
    save_result(result, output)
    return result


def look(subject: Subject, images: ImageDataset, name: str) -> Thumbnails:
    """Thumbnails and hashes of all images, with a progress bar on the main process."""
    hidden = None if is_main_process() else True
    share = -(-len(images) // world_size())
    with tqdm(
        total=share, desc=f"{name} pictures", unit="image", disable=hidden, leave=False
    ) as bar:
        return make_thumbnails(
            images,
            batch_size=subject.batch_size,
            num_workers=subject.num_workers,
            on_batch=bar.update,
        )


def assemble(
    sets: dict[str, ImageDataset], banks: dict[str, FeatureBank], looks: dict[str, Thumbnails]
) -> tuple[Pictures, Tensor]:
    """All sets in one row: what is known of every image, and its features ``[N, D]``.

    An image counts when its features and its thumbnail are known.
    """
    parts: list[tuple[Tensor, ...]] = []
    names: list[str] = []
    for name, look_ in looks.items():
        bank = banks[name]
        in_look = torch.isin(look_.indices, bank.indices)
        in_bank = torch.isin(bank.indices, look_.indices)
        parts.append(
            (
                bank.features[in_bank],
                look_.grey[in_look],
                look_.hashes[in_look],
                look_.areas[in_look],
                look_.indices[in_look],
            )
        )
        names += [name] * int(in_look.sum())
    features, grey, hashes, areas, indices = (torch.cat(column) for column in zip(*parts))  # noqa: B905
    return Pictures(sets, names, indices, grey, hashes, areas), features


def near_pairs(
    features: Tensor, pictures: Pictures, first: Tensor, settings: DuplicatesConfig
) -> tuple[Tensor, Tensor, int]:
    """Pairs that look alike: ``[P, 2]`` ascending, their cosine and appearance ``[P, 2]``.

    Only the first of equal pictures is searched, so that copies do not crowd out what is near.
    The third value is the number of pairs that were looked at.
    """
    kept = torch.unique(first)
    if len(kept) < 2:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 0
    mine = features[kept]
    cosine, place = search(mine, mine, min(settings.neighbours + 1, len(kept)))
    row, column = (cosine >= settings.threshold).nonzero(as_tuple=True)
    one, other = row, place[row, column]
    values = cosine[row, column]
    pairs = torch.stack([torch.minimum(one, other), torch.maximum(one, other)], 1)
    pairs, values = pairs[one != other], values[one != other]
    # A pair is found from both ends: keep it once.
    code, where = torch.unique(pairs[:, 0] * len(kept) + pairs[:, 1], return_inverse=True)
    best = torch.full((len(code),), -1.0).scatter_reduce_(0, where, values, "amax")
    pairs = kept[torch.stack([code // len(kept), code % len(kept)], 1)]
    looked_at = len(pairs)
    alike = appearance(pictures.grey[pairs[:, 0]], pictures.grey[pairs[:, 1]])
    if settings.appearance > 0:
        alike_enough = alike >= settings.appearance
        pairs, best, alike = pairs[alike_enough], best[alike_enough], alike[alike_enough]
    return pairs, torch.stack([best, alike], 1), looked_at


def pair_protocol(settings: DuplicatesConfig, looked_at: int) -> dict[str, Any]:
    """When two images count as duplicates."""
    return {
        "distance": "cosine",
        "threshold": settings.threshold,
        "neighbours": settings.neighbours,
        "appearance": settings.appearance,
        "exact": "SHA-256 of the decoded pixels",
        "pairs_looked_at": looked_at,
    }


def notes_on(settings: DuplicatesConfig, findings: Findings) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    if settings.backbone == "pixels":
        notes.append(
            "pixels do not find mirrored copies, and cropped ones only in part; a trained backbone "
            "does"
        )
    if settings.appearance == 0:
        notes.append(
            "appearance=0: the cosine decides alone, and images that are merely similar count; "
            "look at the picture"
        )
    if findings.metrics["conflicts"]:
        notes.append(
            "groups of different classes come first in the picture: a label is wrong, or the "
            "group is"
        )
    return notes


def table(result: dict[str, Any]) -> str:
    """The numbers for the console."""
    metrics, seconds, data = result["metrics"], result["seconds"], result["data"]
    sizes = ", ".join(f"{images['images']:,} {name}" for name, images in data.items())
    lines = [
        f"duplicates among {sizes} images, seen by {result['backbone']['source']}",
        f"{metrics['exact_images']:>8,}  images whose pixels equal another's",
        f"{metrics['near_pairs']:>8,}  pairs of near-duplicates",
        f"{metrics['groups']:>8,}  groups of images that show the same",
        f"{metrics['train_extra']:>8,}  train images more than one of each group",
    ]
    if "test" in data:
        tests = data["test"]["images"]
        share = 100 * metrics["leaked"] / tests
        lines += [
            f"{metrics['leaked']:>8,}  test images ({share:.2f} %) have a duplicate in train, "
            f"{metrics['leaked_exact']:,} of them pixel for pixel"
        ]
        if metrics["leaked_same_class"] is not None and metrics["leaked"]:
            lines.append(
                f"{metrics['leaked_same_class']:>8,}  of those have the class of that duplicate, "
                f"{metrics['leaked'] - metrics['leaked_same_class']:,} another one"
            )
    if metrics["conflicts"] is not None:
        lines.append(f"{metrics['conflicts']:>8,}  groups with conflicting classes")
    lines.append(
        f"{features_line(result)}, pictures {seconds['pictures']:.1f} s, pairs "
        f"{seconds['pairs']:.1f} s ({result['protocol']['pairs_looked_at']:,} looked at)"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
