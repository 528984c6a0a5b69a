"""A film beside what the network sees in it, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dino_kd.data.pictures import shown_bands
from dino_kd.data.video import Video, read_frames, video_path, write_video
from dino_kd.models.backbone import Backbone
from dino_kd.pca import PatchColours
from dino_kd.schema import VisualizeConfig
from dino_kd.visualize import attention_and_patches, colour_picture, heat_over_image

from .shown import view_of

_FRAMES_AT_ONCE = 8  # large frames need much memory inside the network


def annotate(
    video: Video,
    backbone: Backbone,
    output: Path,
    settings: VisualizeConfig,
    colours: PatchColours,
    *,
    with_attention: bool,
    precision: str,
) -> Path:
    """Write the film with attention (where there is any) and patch colours side by side.

    Frames are read, seen and written a few at a time. Returns the file. Raises UserError.
    """
    path = video_path(output / "film", video)
    step = settings.frame_step
    durations = [sum(video.durations[i : i + step]) for i in range(0, len(video), step)]
    views = (
        view_of(backbone, frame, settings.image_size)
        for frame in read_frames(video, backbone.in_chans, step=step)
    )

    def frames() -> Iterator[np.ndarray]:
        size = min(settings.batch_size, _FRAMES_AT_ONCE)
        while batch := list(islice(views, size)):
            attention, patches = attention_and_patches(
                backbone,
                torch.from_numpy(np.stack(batch)),
                block=settings.block,
                with_attention=with_attention,
                precision=precision,
            )
            for number, view in enumerate(batch):
                height, width = view.shape[1:]
                side_by_side = [shown_bands(view)]
                if attention is not None:
                    side_by_side.append(heat_over_image(view, attention[number].mean(0)))
                side_by_side.append(colour_picture(colours(patches[number]), (height, width)))
                yield _enlarged(np.concatenate(side_by_side, axis=2).transpose(1, 2, 0))

    bar = tqdm(frames(), "film", len(durations), unit="frame", disable=None, leave=False)
    write_video(path, bar, durations)
    return path


def _enlarged(frame: np.ndarray) -> np.ndarray:
    """Frames of a few pixels by a whole number, so that a player shows them sharp."""
    factor = max(1, math.ceil(128 / frame.shape[0]))
    return np.ascontiguousarray(frame.repeat(factor, 0).repeat(factor, 1))
