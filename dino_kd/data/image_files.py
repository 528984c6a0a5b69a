"""Images by their paths, whole or cut to a box: of benchmarks that come with their own lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dino_kd.data.fingerprint import files_fingerprint
from dino_kd.data.images import BrokenImage, decode_image
from dino_kd.errors import DataError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, from the upper left


class ImageFiles:
    """The images `paths`, in that order, without labels.

    With `boxes`, one for each image, only the pixels inside count: edges are rounded to whole
    pixels and kept inside the picture.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        spec: str,
        channels: int = 3,
        boxes: Sequence[Box] | None = None,
    ) -> None:
        if boxes is not None and len(boxes) != len(paths):
            raise ValueError(f"{len(paths)} images and {len(boxes)} boxes")
        self.spec = spec
        self.channels = channels
        self.paths = [str(path) for path in paths]
        self.boxes = None if boxes is None else list(boxes)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage."""
        image = decode_image(self.paths[index], self.channels)
        if self.boxes is None:
            return image
        left, top, right, bottom = (max(0, round(edge)) for edge in self.boxes[index])
        inside = image[top:bottom, left:right]
        if inside.size == 0:
            height, width = image.shape[:2]
            raise BrokenImage(
                self.paths[index],
                f"the box {list(self.boxes[index])} lies outside of its {width} x {height} px",
            )
        return np.ascontiguousarray(inside)

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Path, size and time of change of every file, the channels and boxes."""
        return files_fingerprint(self.paths, "files", self.channels, self.boxes)


def require_files(paths: Sequence[str | Path], where: str, listed_in: str) -> None:
    """Raise DataError unless all files are there; it says how many are not, and names the first."""
    missing = [str(path) for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(paths)} images that {listed_in} names are missing, "
            f"the first is {missing[0]}."
        )


def contents(folder: Path, limit: int = 4) -> str:
    """What a folder holds, for messages: "found jpg/, list.txt"; "found nothing"."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return f"{folder} cannot be listed"
    if not entries:
        return "found nothing in it"
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:limit]]
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return f"found {', '.join(names)}{more}"
