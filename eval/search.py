"""Find the images of a gallery that are most like a given one.

    dino-kd search backbone=runs/x image=query.jpg gallery=/images k=10 sheet=found.png
    python -m eval.search backbone=runs/x image=/queries gallery=features.safetensors
    torchrun --nproc_per_node=4 -m eval.search backbone=runs/x image=/queries gallery=/images

The gallery is a dataset spec, or a file that `dino-kd embed` wrote with the same backbone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.fingerprint import files_fingerprint
from dino_kd.data.images import EXTENSIONS, BrokenImage, decode_image
from dino_kd.data.pictures import save_contact_sheet, tile
from dino_kd.data.specs import make_dataset
from dino_kd.distributed import is_main_process, process_group
from dino_kd.errors import ConfigError, DataError
from dino_kd.features import FeatureBank
from dino_kd.schema import SearchConfig

from .embeddings import CLS, Embeddings, is_embeddings, read_embeddings
from .knn import faiss_search
from .results import (
    Stopwatch,
    closing_lines,
    describe_images,
    make_result,
    result_path,
    save_result,
    title,
)
from .subject import Subject, open_images, open_subject

_SHOWN = 20  # queries in the table and in the picture
_TILE = 128  # pixels


class OneImage:
    """A data set of a single image file."""

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(self, file: str, channels: int) -> None:
        self.spec = file
        self.channels = channels

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> np.ndarray:
        """The image as uint8 [H, W, C]. Raises BrokenImage."""
        return decode_image(self.spec, self.channels)

    def path(self, index: int) -> str:
        """The file."""
        return self.spec

    def fingerprint(self) -> str:
        """Of the file and the channels."""
        return files_fingerprint([self.spec], "one", self.channels)


@dataclass
class Gallery:
    """What is searched: features, and how to name and to show each of their images."""

    features: Tensor
    path: Callable[[int], str]
    read: Callable[[int], np.ndarray]
    about: dict[str, Any]
    notes: list[str]


def main(argv: list[str]) -> int:
    """`dino-kd search a.b=c ...`; returns the exit code."""
    settings = load_settings(SearchConfig, argv, command="search")
    with process_group(settings.device) as device:
        search(settings, device)
    return 0


def search(settings: SearchConfig, device: torch.device) -> dict[str, Any]:
    """Search for every image; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: nothing to look for or in, features of another backbone, k beyond the gallery.
    """
    watch = Stopwatch()
    output = result_path(settings, "search")
    if settings.sheet is not None and Path(settings.sheet).suffix.lower() != ".png":
        raise ConfigError(f"sheet: the name of a .png file is needed, got {settings.sheet!r}")
    subject = open_subject(settings, device)
    queries = open_queries(settings, subject.channels)
    gallery = open_gallery(settings, subject)
    bank = subject.features(queries, "image")
    if not is_main_process():
        return {}
    watch.lap("features")
    similarity, place = faiss_search(bank.features, gallery.features, settings.k)
    watch.lap("search")
    found = [
        {
            "image": queries.path(index),
            "neighbours": [
                {"path": gallery.path(p), "similarity": round(s, 6)}
                for p, s in zip(places, values, strict=True)
            ],
        }
        for index, places, values in zip(
            bank.indices.tolist(), place.tolist(), similarity.tolist(), strict=True
        )
    ]
    result = make_result(
        "search",
        settings,
        metrics={"queries": len(found), "gallery": len(gallery.features)},
        protocol=subject.protocol | {"k": settings.k, "distance": "cosine", "search": "faiss"},
        backbone=subject.description,
        data={"image": describe_images(queries, bank), "gallery": gallery.about},
        device=device,
        seconds=watch.seconds,
        notes=gallery.notes,
    )
    result["found"] = found
    print(table(result, settings))
    if settings.sheet is not None:
        draw(settings.sheet, queries, bank, gallery, place)
        print(f"picture written to {settings.sheet}")
    save_result(result, output)
    return result


def open_queries(settings: SearchConfig, channels: int) -> ImageDataset:
    """The images of `image`: a file, a folder or a spec. Raises UserError."""
    path = Path(settings.image).expanduser()
    if not path.is_file() or path.suffix.lower() not in EXTENSIONS:
        return make_dataset(
            settings.image, channels=channels, download=settings.download, where="image"
        )
    one = OneImage(str(path), channels)
    try:
        one.read(0)
    except BrokenImage as error:
        raise DataError(f"image: {error.path} cannot be read: {error.reason}") from None
    return one


def open_gallery(settings: SearchConfig, subject: Subject) -> Gallery:
    """The features that are searched, extracted now or read from a file. Raises UserError."""
    if is_embeddings(settings.gallery):
        path = Path(settings.gallery).expanduser()
        embeddings = read_embeddings(path, "gallery")
        check_origin(path, embeddings, subject)
        check_k(settings.k, len(embeddings.paths))
        return Gallery(
            embeddings.parts[CLS],
            embeddings.paths.__getitem__,
            lambda place: decode_image(embeddings.paths[place], subject.channels),
            {"file": str(path), "spec": embeddings.about["data"], "images": len(embeddings.paths)},
            protocol_notes(embeddings, subject),
        )
    images = open_images(settings, "gallery", subject.channels)
    check_k(settings.k, len(images))
    bank = subject.features(images, "gallery")
    check_k(settings.k, len(bank.features))
    return Gallery(
        bank.features,
        lambda place: images.path(int(bank.indices[place])),
        lambda place: images.read(int(bank.indices[place])),
        describe_images(images, bank),
        [],
    )


def check_origin(path: Path, embeddings: Embeddings, subject: Subject) -> None:
    """Raise DataError unless the file's features and `subject`'s can be compared."""
    theirs, ours = embeddings.about["backbone"], subject.description
    size = embeddings.about["protocol"]["image_size"]
    if theirs.get("sha256") != ours.get("sha256"):
        # a ViT's position embeddings are part of its weights, and follow the input's size
        other = f" and image_size={size}" if size != list(subject.size) else ""
        raise DataError(
            f"gallery: {path} was made by {_origin(theirs)}, and the backbone here is "
            f"{_origin(ours)}: their features cannot be compared. Name the backbone it was made "
            f"with{other}, or run 'dino-kd embed' again with this one"
        )
    width = embeddings.parts[CLS].shape[1]
    expected = (
        subject.backbone.embed_dim
        if subject.backbone is not None
        else subject.channels * subject.size[0] * subject.size[1]
    )
    if width != expected:
        raise DataError(
            f"gallery: {path} holds features of {width} numbers, and {ours['source']} gives "
            f"{expected} here; use the image_size it was made with ({size})"
        )


def _origin(description: dict[str, Any]) -> str:
    digest = description.get("sha256")
    return f"{description['source']} (weights {digest[:12]})" if digest else description["source"]


def protocol_notes(embeddings: Embeddings, subject: Subject) -> list[str]:
    """A sentence for everything that was done to the gallery's images and not to the queries."""
    theirs = embeddings.about["protocol"]
    return [
        f"the gallery was embedded with {key}={theirs.get(key)}, the queries with {key}={value}"
        for key, value in subject.protocol.items()
        if theirs.get(key) != value
    ]


def check_k(k: int, count: int) -> None:
    """Raise ConfigError when the gallery is smaller than `k`."""
    if k > count:
        raise ConfigError(f"k: {k} neighbours are asked for, but the gallery has {count} images")


def table(result: dict[str, Any], settings: SearchConfig) -> str:
    """The neighbours for the console, the first queries of many."""
    lines = [title("nearest images", settings, result["backbone"])]
    for one in result["found"][:_SHOWN]:
        lines.append(f"{one['image']}")
        lines += [f"  {n['similarity']:7.4f}  {n['path']}" for n in one["neighbours"]]
    rest = len(result["found"]) - _SHOWN
    if rest > 0:
        lines.append(f"... and {rest} more images; output=FILE writes all of them")
    lines.append(
        f"{len(result['found'])} images compared with {result['metrics']['gallery']:,} of the "
        f"gallery; features {result['seconds']['features']:.1f} s, search "
        f"{result['seconds']['search']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


def draw(
    sheet: str, queries: ImageDataset, bank: FeatureBank, gallery: Gallery, place: Tensor
) -> None:
    """The first queries and their neighbours as a PNG; an empty square for what is gone."""

    def shown(read: Callable[[int], np.ndarray], index: int) -> np.ndarray:
        try:
            return tile(read(index), _TILE)
        except BrokenImage:  # the gallery's file may know images that have moved
            return tile(None, _TILE)

    rows = range(min(_SHOWN, len(bank.indices)))
    columns = [("query", [shown(queries.read, int(bank.indices[row])) for row in rows])]
    for rank in range(place.shape[1]):
        found = [shown(gallery.read, int(place[row, rank])) for row in rows]
        columns.append((str(rank + 1), found))
    names = [f"query {number + 1}" for number in rows]
    save_contact_sheet(columns, Path(sheet).expanduser(), row_names=names)


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
