"""Judge features without labels: rank, spectrum, uniformity, alignment of views, LiDAR.

    dino-kd quality backbone=runs/x data=/images
    python -m eval.quality backbone=random:resnet18_cifar data=cifar10:/data:test images=2000
    torchrun --nproc_per_node=4 -m eval.quality backbone=runs/x data=/images

Prints a table and a verdict in words. docs/embed.md says what each number means.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset, subset
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.views import ViewedImages
from dino_kd.distributed import is_main_process, process_group
from dino_kd.errors import DataError
from dino_kd.features import FeatureBank
from dino_kd.metrics import spectrum
from dino_kd.schema import QualityConfig

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
from .subject import Subject, open_images, open_subject

_ROWS = {
    "rankme": ("RankMe", "{:10.2f}", "directions in use, 1 to {limit}; higher is better"),
    "effective_rank": ("effective rank", "{:10.2f}", "the same of the centred covariance"),
    "participation_ratio": ("participation", "{:10.2f}", "the same, large directions weigh more"),
    "alpha_req": ("alpha-ReQ", "{:10.3f}", "decay of the spectrum; near 1 is best"),
    "uniformity": ("uniformity", "{:10.3f}", "0 is all alike; lower is more evenly spread"),
    "alignment": ("alignment", "{:10.3f}", "0 is equal views; lower is better at equal uniformity"),
    "lidar": ("LiDAR", "{:10.2f}", "directions that tell images apart whatever the view; higher"),
    "feature_std": ("feature std", "{:10.4f}", "of features of length 1; {flat:.4f} is evenly"),
    "dead_dimensions": ("dead share", "{:10.4f}", "of the {width} dimensions that never move"),
}


def main(argv: list[str]) -> int:
    """`dino-kd quality a.b=c ...`; returns the exit code."""
    settings = load_settings(QualityConfig, argv, command="quality")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: QualityConfig, device: torch.device) -> dict[str, Any]:
    """Judge one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, fewer than two readable images.
    """
    watch = Stopwatch()
    output = result_path(settings, "quality")
    subject = open_subject(settings, device)
    images = spread(open_images(settings, "data", subject.channels), settings.images)
    require_two(len(images), images)
    bank = subject.features(images, "data")
    require_two(len(bank.features), images)
    watch.lap("features")
    seen = spread(images, settings.view_images)
    views = features_of_views(subject, seen, settings)
    require_two(len(views), seen, "of which every view can be made")
    watch.lap("views")
    if not is_main_process():
        return {}
    metrics = dict(evaluate(bank, views))
    watch.lap("metrics")
    result = make_result(
        "quality",
        settings,
        metrics=metrics,
        protocol=subject.protocol | view_protocol(settings, len(views)),
        backbone=subject.description,
        data={"data": describe_images(images, bank)},
        device=device,
        seconds=watch.seconds,
        notes=few_images_note(bank),
    )
    result["verdict"] = verdict(metrics, bank.features.shape)
    print(table(result, settings, bank))
    save_result(result, output)
    return result


def evaluate(bank: FeatureBank, views: Tensor) -> Iterator[tuple[str, float]]:
    """Yield every metric; `views` is ``[N, Q, D]``, Q views of each of N images."""
    features = bank.features
    eigenvalues = spectrum.covariance_spectrum(features)
    yield "rankme", spectrum.rankme(features)
    yield "effective_rank", spectrum.effective_rank(eigenvalues)
    yield "participation_ratio", spectrum.participation_ratio(eigenvalues)
    yield "alpha_req", spectrum.alpha_req(eigenvalues)
    yield "uniformity", spectrum.uniformity(features)
    yield "alignment", spectrum.alignment(views)
    yield "lidar", spectrum.lidar(views)
    yield "feature_std", spectrum.mean_std(features)
    yield "dead_dimensions", spectrum.dead_dimensions(features)


def spread(dataset: ImageDataset, count: int) -> ImageDataset:
    """At most `count` images, evenly over the set: folders are sorted by class."""
    if len(dataset) <= count:
        return dataset
    return subset(dataset, np.arange(count) * len(dataset) // count)


def features_of_views(subject: Subject, images: ImageDataset, settings: QualityConfig) -> Tensor:
    """``[N, Q, D]``: features of the augmented views of all images that can be read."""
    policy = CropPolicy(global_size=subject.size)
    views = ViewedImages(
        images, np.arange(len(images)), policy, num_views=settings.views, seed=settings.seed
    )
    # The crops have the input's size already; any other `resize` would cut their border off.
    as_they_are = replace(subject, resize=min(subject.size))
    bank = as_they_are.features(views, "views")
    source = bank.indices // settings.views
    whole = (torch.bincount(source, minlength=len(images)) == settings.views)[source]
    return bank.features[whole].unflatten(0, (-1, settings.views))


def require_two(count: int, images: ImageDataset, what: str = "that can be read") -> None:
    """Raise DataError when fewer than two images are left: one has no spread."""
    if count < 2:
        raise DataError(
            f"data: {images.spec} has {count} {'image' if count == 1 else 'images'} {what}, and "
            "quality is about how features of different images differ: give at least 2, better "
            "some thousand."
        )


def view_protocol(settings: QualityConfig, count: int) -> dict[str, Any]:
    """How the metrics are defined, beyond the features."""
    return {
        "views": settings.views,
        "view_images": count,
        "view_policy": "DINO global crops",
        "seed": settings.seed,
        "rankme_epsilon": spectrum.RANKME_EPSILON,
        "lidar_delta": spectrum.LIDAR_DELTA,
        "alpha_ranks": list(spectrum.ALPHA_RANKS),
        "uniformity_t": 2,
    }


def verdict(metrics: dict[str, float], shape: torch.Size) -> str:
    """The first thing that is wrong with the features, in a sentence, or that nothing is."""
    limit = min(shape)
    rank = metrics["effective_rank"]
    if rank == 0 or metrics["feature_std"] < 1e-5:
        return "collapsed: every image gets the same feature, and nothing can be read from it"
    if rank < 2:
        return (
            f"nearly collapsed: the features vary along {rank:.1f} directions of {limit}; an image "
            "is hardly more than one number"
        )
    if rank < 0.02 * limit or metrics["dead_dimensions"] > 0.5:
        return (
            f"narrow: the features use about {rank:.0f} of {limit} directions, and "
            f"{100 * metrics['dead_dimensions']:.0f} % of the dimensions never move; usual for "
            "pixels and untrained networks, a sign of partial collapse for a trained one"
        )
    return (
        f"no collapse: about {rank:.0f} of {limit} directions are in use. Compare these numbers "
        "between checkpoints of one architecture on the same images; they do not replace a score"
    )


def few_images_note(bank: FeatureBank) -> list[str]:
    """A warning that N, not the network, limits the ranks."""
    count, width = bank.features.shape
    if count >= 2 * width:
        return []
    return [
        f"{count} images cannot show all {width} dimensions: the ranks and the decay are limited "
        f"by their number; give {2 * width:,} or more"
    ]


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows."""
    metrics = result["metrics"]
    return [("RankMe", f"{metrics['rankme']:.1f}"), ("LiDAR", f"{metrics['lidar']:.1f}")]


def table(result: dict[str, Any], settings: QualityConfig, bank: FeatureBank) -> str:
    """The numbers for the console, each with its direction."""
    count, width = bank.features.shape
    known = {"limit": min(count, width), "width": width, "flat": width**-0.5}
    lines = [title("quality", settings, result["backbone"])]
    for name, (shown, layout, meaning) in _ROWS.items():
        value = layout.format(result["metrics"][name])
        lines.append(f"{shown:<14} {value}  {meaning.format(**known)}")
    lines.append(f"verdict: {result['verdict']}")
    lines.append(
        f"{count:,} images, {width} dimensions; {result['protocol']['view_images']} images in "
        f"{settings.views} views each; {features_line(result)}, views "
        f"{result['seconds']['views']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
