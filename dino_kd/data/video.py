"""Frames of a video or an animation, one after the other, and back into a file.

GIF and WebP by Pillow; every other container by PyAV, an optional extra. A file is decoded as a
stream: memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, features

from dino_kd.data.images import picture_to_array
from dino_kd.errors import ConfigError, DataError
from dino_kd.files import write_atomic

VIDEO_EXTENSIONS = frozenset((
    ".mp4", ".avi", ".mov", ".webm", ".mkv", ".m4v", ".mpg", ".mpeg", ".ogv", ".wmv",
))  # fmt: skip
ANIMATION_EXTENSIONS = frozenset((".gif", ".webp"))
_USUAL_DURATION = 0.1  # seconds of a frame that states none, as browsers show it
_TOLERATED_SECONDS, _TOLERATED_SHARE = 0.5, 0.1  # headers of whole files are a little off too


@dataclass(frozen=True)
class Video:
    """A file that has been read once from end to end. Open it with `open_video`.

    Attributes:
        path: the file.
        where: the setting that names it, for messages.
        durations: seconds that each frame is shown.
        promised: frames that the file's header states, 0 when it states none.
        is_animation: GIF or WebP.
    """

    path: str
    where: str
    durations: tuple[float, ...]
    promised: int
    is_animation: bool

    def __len__(self) -> int:
        return len(self.durations)

    def second(self, index: int) -> float:
        """When frame `index` appears."""
        return sum(self.durations[:index])

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return sum(self.durations)


def is_video(path: str | Path) -> bool:
    """Whether `path` is a file that moves: a video by its name, or an animated GIF or WebP."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return True
    if path.suffix.lower() not in ANIMATION_EXTENSIONS:
        return False
    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) > 1
    except Exception:  # damaged: whoever reads the image says how
        return False


def open_video(path: str | Path, where: str = "input") -> Video:
    """Read a video once from end to end, so that damage is known before the work starts.

    Raises:
        ConfigError: PyAV is needed and not installed.
        DataError: no video, damaged, cut short, or without a single frame.
    """
    path = str(path)
    animation = Path(path).suffix.lower() in ANIMATION_EXTENSIONS
    probe = Video(path, where, (), 0, animation)
    durations: list[float] = []
    promised = 0
    for _, duration, stated in _pictures(probe):
        durations.append(duration)
        promised = stated
    if not durations:
        raise DataError(f"{where}: {path} holds no frames of video")
    return Video(path, where, tuple(durations), promised, animation)


def read_frames(video: Video, channels: int, *, step: int = 1) -> Iterator[np.ndarray]:
    """Every `step`-th frame, the first one included, as uint8 [H, W, `channels`].

    Raises:
        DataError: the file changed or cannot be read, or `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise DataError(
            f"{video.where}: frames of {video.path} are colour pictures; a network of "
            f"{channels} channels cannot see them"
        )
    for number, (picture, _, _) in enumerate(_pictures(video)):
        if number % step == 0:
            yield picture_to_array(picture, channels)


def video_path(stem: str | Path, video: Video) -> Path:
    """Where a picture of `video` goes: ``STEM.mp4``, or ``STEM.webp`` (``.gif``) for animations."""
    animation = ".webp" if features.check("webp") else ".gif"
    return Path(f"{stem}{animation if video.is_animation else '.mp4'}")


def write_video(path: str | Path, frames: Iterable[np.ndarray], durations: list[float]) -> None:
    """Write frames uint8 [H, W, 3] of one size: MP4 (H.264), WebP or GIF, as the name ends.

    Args:
        path: where to.
        frames: read one at a time. Sides of an MP4 are made even by repeating the last line.
        durations: seconds of each frame; an MP4 has the mean frame rate throughout.

    Raises:
        ConfigError: PyAV is needed and not installed.
        UserError: the disk is full.
    """
    path = Path(path)
    if path.suffix in ANIMATION_EXTENSIONS:
        write_atomic(path, lambda temporary: _write_animation(temporary, path, frames, durations))
    else:
        write_atomic(path, lambda temporary: _write_mp4(temporary, frames, durations))


# An item below is (picture, seconds it is shown, frames that the header states or 0).


def _pictures(video: Video) -> Iterator[tuple[Image.Image, float, int]]:
    made = _animated_pictures(video) if video.is_animation else _video_pictures(video)
    try:
        yield from made
    except FileNotFoundError:
        raise DataError(f"{video.where}: {video.path} does not exist") from None


def _animated_pictures(video: Video) -> Iterator[tuple[Image.Image, float, int]]:
    number = 0
    try:
        with Image.open(video.path) as picture:
            count = getattr(picture, "n_frames", 1)
            for number in range(count):
                picture.seek(number)
                picture.load()
                seconds = float(picture.info.get("duration", 0)) / 1000
                yield picture, seconds if seconds > 0 else _USUAL_DURATION, count
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(video, number, error) from error


def _video_pictures(video: Video) -> Iterator[tuple[Image.Image, float, int]]:
    av = _av(video.where)
    number = 0
    try:
        with av.open(video.path) as container:
            if not container.streams.video:
                raise DataError(f"{video.where}: {video.path} holds sound or text, and no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            seconds = float(1 / (stream.average_rate or 25))
            end = 0.0
            for frame in container.decode(stream):
                yield _upright(frame), seconds, stream.frames
                number += 1
                end = seconds + (number * seconds if frame.time is None else frame.time)
            stated = _stated_seconds(container, stream)
    except (av.FFmpegError, OSError) as error:
        raise _damaged(video, number, error) from error
    if stated - end > max(_TOLERATED_SECONDS, _TOLERATED_SHARE * stated):
        raise DataError(
            f"{video.where}: {video.path} is cut short: it states {stated:.1f} s, and {number} "
            f"frames ({end:.1f} s) can be read"
        )


def _stated_seconds(container: Any, stream: Any) -> float:
    """How long the header says that the picture lasts; 0 when it does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1  # else the sound may be longer
    return container.duration / 1_000_000 if alone and container.duration else 0.0


def _upright(frame: Any) -> Image.Image:
    """Telephones store films lying down, with a note how to turn them."""
    turn = getattr(frame, "rotation", 0)
    picture = frame.to_image()
    return picture.rotate(turn, expand=True) if turn else picture


def _write_mp4(path: Path, frames: Iterable[np.ndarray], durations: list[float]) -> None:
    av = _av("output")
    rate = Fraction(len(durations) / sum(durations)).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = None
        for frame in frames:
            even = np.pad(
                frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge"
            )
            if stream is None:
                stream = container.add_stream(_encoder(av), rate=rate)
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.bit_rate = 8_000_000
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            container.mux(stream.encode(picture))
        if stream is not None:
            container.mux(stream.encode(None))


def _encoder(av: ModuleType) -> str:
    """H.264, which every browser plays, where PyAV was built with it."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def _write_animation(
    temporary: Path, path: Path, frames: Iterable[np.ndarray], durations: list[float]
) -> None:
    pictures = (Image.fromarray(frame) for frame in frames)
    first = next(pictures)
    first.save(
        temporary,
        format=path.suffix[1:].upper(),
        save_all=True,
        append_images=pictures,
        duration=[round(1000 * seconds) for seconds in durations],
        loop=0,
        **({"quality": 85, "method": 2} if path.suffix == ".webp" else {}),
    )


def _av(where: str) -> ModuleType:
    try:
        import av
    except ImportError:
        raise ConfigError(
            f"{where}: videos need PyAV, which is not installed: pip install 'dino_kd[video]'. "
            "Folders of frames and animated GIF or WebP files work without it"
        ) from None
    return av


def _damaged(video: Video, frames: int, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if frames:
        return DataError(
            f"{video.where}: {video.path} is damaged or cut short after {frames} frames ({reason})"
        )
    return DataError(f"{video.where}: {video.path} cannot be read as a video ({reason})")
