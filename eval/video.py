"""Score a frozen backbone by following objects through videos: DAVIS 2017, semi-supervised.

    dino-kd video backbone=runs/x root=/data/DAVIS
    python -m eval.video backbone=timm:NAME root=/data/DAVIS predictions=/tmp/masks
    torchrun --nproc_per_node=4 -m eval.video backbone=runs/x root=/data/DAVIS

Nothing is trained: the first frame's masks travel along similar patch features (Jabri et al. 2020,
arXiv 2006.14613; DINO, arXiv 2104.14294). docs/retrieval.md describes folders and protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dino_kd.config import load_settings
from dino_kd.data.davis import VOID, Video, read_davis, read_mask, write_mask
from dino_kd.data.image_files import ImageFiles
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import image_batches
from dino_kd.data.whole_views import Stretch, frame_size
from dino_kd.distributed import (
    all_gather_objects,
    is_main_process,
    process_group,
    processes_here,
    rank,
    world_size,
)
from dino_kd.engine.precision import autocast, choose_precision
from dino_kd.errors import CheckpointError, ConfigError, DataError, UserError
from dino_kd.features import evaluation_mode
from dino_kd.metrics.masks import boundary_similarity, over_time, region_similarity
from dino_kd.models.backbone import Backbone
from dino_kd.presets import loader_processes
from dino_kd.propagation import follow, labels_to_mask
from dino_kd.schema import VideoConfig

from .described import FORWARD_FAILURES, open_network
from .results import (
    Stopwatch,
    closing_lines,
    make_result,
    result_path,
    save_result,
    title,
)

PIXEL_PATCH = 8  # side of the patches of `backbone=pixels`


@dataclass
class Tracker:
    """Everything that turns the frames of a video into masks.

    Attributes:
        backbone: None for pixels: the colours of a patch of 8 x 8 are its features.
        grids: rows and columns of patches by size of the input.
        seconds: by part, of this process.
    """

    settings: VideoConfig
    backbone: Backbone | None
    device: torch.device
    precision: str
    num_workers: int
    grids: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def input_size(self, video: Video) -> tuple[int, int]:
        """(height, width) in pixels that the network sees."""
        patch = PIXEL_PATCH if self.backbone is None else self.backbone.patch_size
        return frame_size(*video.size, self.settings.image_size, patch)

    def prepare(self, videos: Sequence[Video]) -> None:
        """Learn the grid of every size. Raises ConfigError for a size that does not work."""
        for video in videos:
            size = self.input_size(video)
            if size in self.grids:
                continue
            channels = 3 if self.backbone is None else self.backbone.in_chans
            try:
                probe = torch.zeros(1, channels, *size, dtype=torch.uint8)
                self.grids[size] = self._patches(probe)[1]
            except FORWARD_FAILURES as error:
                name = "pixels" if self.backbone is None else self.backbone.name
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ConfigError(
                    f"backbone: {name} cannot take frames of {size[0]} x {size[1]} px ({reason}); "
                    "use a plain ViT or a CNN"
                ) from error

    def masks(self, video: Video) -> Iterator[np.ndarray]:
        """Object numbers uint8 ``[H, W]`` of every frame; the first are given, the rest followed.

        Raises DataError for a frame that cannot be read.
        """
        given, _ = read_mask(video.masks[0])
        given = np.where(given == VOID, 0, given)
        yield given
        size = self.input_size(video)
        grid = self.grids[size]
        first = first_labels(given, video.objects, grid).to(self.device)
        for labels in follow(
            self._features(video, size),
            first,
            grid=grid,
            queue=self.settings.queue,
            topk=self.settings.topk,
            temperature=self.settings.temperature,
            radius=self.settings.radius,
        ):
            yield enlarge(labels_to_mask(labels, grid, size).cpu().numpy(), video.size)

    def _features(self, video: Video, size: tuple[int, int]) -> Iterator[Tensor]:
        """Patch features ``[P, D]`` of every frame in order, on the device."""

        def refuse(broken: BrokenImage) -> None:
            raise DataError(f"root: a frame cannot be read: {broken}.")

        channels = 3 if self.backbone is None else self.backbone.in_chans
        for images, _ in image_batches(
            ImageFiles(video.frames, spec=video.name, channels=channels),
            range(len(video.frames)),
            Stretch(size, "bilinear"),
            batch_size=self.settings.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            on_broken=refuse,
        ):
            patches, _ = self._patches(images)
            if not torch.isfinite(patches).all():
                raise CheckpointError(
                    f"backbone: {self.settings.backbone} gives features that are not finite on "
                    f"{video.name}; its weights are damaged or its training diverged"
                )
            yield from patches

    @torch.no_grad()
    def _patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features ``[N, P, D]`` of uint8 images ``[N, C, H, W]``, and their grid."""
        images = images.to(self.device, non_blocking=True)
        if self.backbone is None:
            cells = F.pixel_unshuffle(images.float() / 255 - 0.5, PIXEL_PATCH)  # [N, D, rows, ...]
            return cells.flatten(2).transpose(1, 2), (cells.shape[2], cells.shape[3])
        with (
            evaluation_mode(self.backbone, self.device, self.precision),
            autocast(self.precision, self.device),
        ):
            tokens = self.backbone.tokens(self.backbone.preprocess(images))
        return tokens.patches.float(), tokens.grid


def main(argv: list[str]) -> int:
    """`dino-kd video a.b=c ...`; returns the exit code."""
    settings = load_settings(VideoConfig, argv, command="video")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: VideoConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Sequences are shared out over the processes. Returns the result as it is written to JSON (empty
    on other processes).

    Raises:
        UserError: no such backbone, not DAVIS's folders, a frame or annotation that is broken.
    """
    watch = Stopwatch()
    output = result_path(settings, "video")
    videos = read_davis(
        settings.root,
        "root",
        split=settings.split,
        resolution=settings.resolution,
        names=settings.sequences,
    )
    predictions = predictions_folder(settings)
    backbone, description = open_network(settings, device)
    tracker = Tracker(
        settings=settings,
        backbone=backbone,
        device=device,
        precision="fp32" if backbone is None else choose_precision(settings.precision, device),
        num_workers=loader_processes(settings.num_workers, processes_here()),
    )
    tracker.prepare(videos)
    watch.lap("preparation")
    found = score_all(videos, lambda video: score_video(tracker, video, predictions))
    watch.lap("videos")
    if not is_main_process():
        return {}
    metrics = dict(evaluate(found))
    result = make_result(
        "video",
        settings,
        metrics=metrics,
        protocol=video_protocol(tracker),
        backbone=description,
        data={
            "videos": {
                "root": settings.root,
                "split": settings.split,
                "sequences": len(videos),
                "objects": sum(video.objects for video in videos),
                "frames": sum(len(video.frames) for video in videos),
            }
        },
        device=device,
        seconds=watch.seconds,
        notes=void_notes(found),
    )
    result["sequences"] = {one.name: one.as_json() for one in found}
    print(table(result, settings))
    if predictions is not None:
        print(f"masks written to {predictions}")
    save_result(result, output)
    return result


@dataclass
class Scored:
    """J and F of one sequence, float64 ``[objects, scored frames]``, in 0..1."""

    name: str
    region: np.ndarray
    boundary: np.ndarray
    void_pixels: int

    def as_json(self) -> dict[str, list[float]]:
        """The mean of every object, in percent."""
        return {
            "j_mean": [round(100 * float(v), 3) for v in self.region.mean(1)],
            "f_mean": [round(100 * float(v), 3) for v in self.boundary.mean(1)],
        }


def score_video(tracker: Tracker, video: Video, predictions: Path | None) -> Scored:
    """Follow one video's objects, write their masks, compare all but the first and last frame.

    Raises UserError: a broken frame or annotation, a full disk.
    """
    _, palette = read_mask(video.masks[0])
    numbers = range(1, video.objects + 1)
    region, boundary, void_pixels = [], [], 0
    last = len(video.frames) - 1
    for t, mask in enumerate(tracker.masks(video)):
        if predictions is not None:
            write_mask(predictions / video.name / video.masks[t].name, mask, palette)
        if t in (0, last):
            continue
        truth, _ = read_mask(video.masks[t])
        void = truth == VOID
        void_pixels += int(void.sum())
        region.append([region_similarity(mask == n, truth == n, void) for n in numbers])
        boundary.append([boundary_similarity(mask == n, truth == n, void) for n in numbers])
    return Scored(video.name, np.array(region).T, np.array(boundary).T, void_pixels)


def score_all(videos: Sequence[Video], score_one: Callable[[Video], Scored]) -> list[Scored]:
    """All videos' scores in order, on every process; each process takes every n-th video.

    Raises the UserError of whichever process met one, on all of them.
    """
    mine = list(range(rank(), len(videos), world_size()))
    done: list[tuple[int, Scored]] = []
    failures: list[UserError] = []
    hidden = None if is_main_process() else True
    with tqdm(total=len(mine), desc="videos", unit="video", disable=hidden, leave=False) as bar:
        try:
            for i in mine:
                bar.set_postfix_str(videos[i].name)
                done.append((i, score_one(videos[i])))
                bar.update()
        except UserError as error:
            failures.append(error)
    failures = all_gather_objects(failures)
    if failures:
        raise failures[0]
    return [scored for _, scored in sorted(all_gather_objects(done), key=lambda pair: pair[0])]


def evaluate(found: Sequence[Scored]) -> Iterator[tuple[str, float]]:
    """Yield ``jf_mean`` and the mean, recall and decay of J and F in percent, over all objects."""
    by_object = {
        "j": [over_time(values) for one in found for values in one.region],
        "f": [over_time(values) for one in found for values in one.boundary],
    }
    means = {name: float(np.mean([o.mean for o in objects])) for name, objects in by_object.items()}
    yield "jf_mean", 100 * (means["j"] + means["f"]) / 2
    for name, objects in by_object.items():
        yield f"{name}_mean", 100 * means[name]
        yield f"{name}_recall", 100 * float(np.mean([o.recall for o in objects]))
        yield f"{name}_decay", 100 * float(np.mean([o.decay for o in objects]))


def first_labels(mask: np.ndarray, objects: int, grid: tuple[int, int]) -> Tensor:
    """One-hot labels float32 ``[1 + objects, P]`` of an annotation, by the pixel in each centre."""
    small = np.array(
        Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    )  # [rows, columns]
    return F.one_hot(torch.from_numpy(small).long().flatten(), objects + 1).T.float()


def enlarge(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Object numbers at the size of the frame (height, width), by the nearest pixel."""
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def predictions_folder(settings: VideoConfig) -> Path | None:
    """Where masks go. Raises ConfigError for a file, and for the folder of the annotations."""
    if settings.predictions is None:
        return None
    folder = Path(settings.predictions).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"predictions: {folder} is a file; give a folder")
    truth = (Path(settings.root).expanduser() / "Annotations").resolve()
    if folder.resolve() == truth or truth in folder.resolve().parents:
        raise ConfigError(
            f"predictions: {folder} holds the annotations, which would be overwritten; give another"
        )
    return folder


def video_protocol(tracker: Tracker) -> dict[str, Any]:
    """How frames become masks and masks become numbers."""
    settings = tracker.settings
    return {
        "image_size": settings.image_size,
        "input_sizes": [list(size) for size in tracker.grids],
        "grids": [list(grid) for grid in tracker.grids.values()],
        "interpolation": "bilinear",
        "precision": tracker.precision,
        "queue": settings.queue,
        "topk": settings.topk,
        "temperature": settings.temperature,
        "radius": settings.radius,
        "masks": "bilinear, each class stretched to 0..1, highest wins",
        "scored": "all frames but the first and the last, objects of the first frame",
        "boundary_tolerance": "0.008 of the diagonal",
    }


def void_notes(found: Sequence[Scored]) -> list[str]:
    """The sentence about void pixels, if there are any."""
    with_void = [one.name for one in found if one.void_pixels]
    if not with_void:
        return []
    return [
        f"void pixels (255) of {len(with_void)} sequences, such as {with_void[0]}, do not count; "
        "the official semi-supervised script takes them for background"
    ]


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows."""
    return [("video segmentation J&F %", f"{result['metrics']['jf_mean']:.2f}")]


def table(result: dict[str, Any], settings: VideoConfig) -> str:
    """The numbers for the console."""
    metrics, videos, seconds = result["metrics"], result["data"]["videos"], result["seconds"]
    lines = [
        title("Video object segmentation", settings, result["backbone"]),
        f"{'':>3}  {'mean %':>7}  {'recall %':>8}  {'decay %':>7}",
        f"{'J&F':>3}  {metrics['jf_mean']:7.2f}",
    ]
    for name in ("j", "f"):
        mean, recall, decay = (metrics[f"{name}_{part}"] for part in ("mean", "recall", "decay"))
        lines.append(f"{name.upper():>3}  {mean:7.2f}  {recall:8.2f}  {decay:7.2f}")
    lines.append(
        f"{videos['sequences']:,} sequences, {videos['objects']:,} objects, "
        f"{videos['frames']:,} frames; {seconds['videos']:.1f} s"
    )
    worst = sorted(
        (float(np.mean([one["j_mean"], one["f_mean"]])), name)
        for name, one in result["sequences"].items()
    )[:3]
    lines.append("lowest J&F: " + ", ".join(f"{name} {value:.1f}" for value, name in worst))
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
