"""Benchmarks of retrieval in their official folders: revisited Oxford and Paris, and Copydays.

Radenovic et al. 2018, "Revisiting Oxford and Paris" (arXiv 1803.11285); Douze et al. 2009,
"Evaluation of GIST descriptors for web-scale image search" (Copydays).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_kd.data.image_files import Box, contents, require_files
from dino_kd.data.unpickle import read_plain_pickle
from dino_kd.errors import DataError

REVISITED = ("roxford5k", "rparis6k")
PROTOCOLS = {  # (positives, ignored); everything else in the database is a wrong answer
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
_JUDGED = ("easy", "hard", "junk")
_COPY_NAME = re.compile(r"\d{6}")  # 4 digits of the original, 2 of the copy
_BLOCK_DIGITS = 4


@dataclass
class RevisitedSet:
    """One of `REVISITED`.

    Attributes:
        name: such as "roxford5k".
        images: files of the database.
        queries: files of the queries, which are not in the database.
        boxes: the part of each query that is searched for.
        judged: for every query, int64 indices into `images` by "easy", "hard" and "junk".
    """

    name: str
    images: list[Path]
    queries: list[Path]
    boxes: list[Box]
    judged: list[dict[str, np.ndarray]]

    def positives_and_ignored(self, query: int, protocol: str) -> tuple[np.ndarray, np.ndarray]:
        """Indices of what should be found and of what does not count, by `PROTOCOLS`."""
        positives, ignored = (
            np.concatenate([self.judged[query][name] for name in names])
            for names in PROTOCOLS[protocol]
        )
        return positives, ignored


def find_revisited(root: str | Path, where: str) -> list[str]:
    """Which of `REVISITED` a folder holds. Raises DataError for none."""
    root = Path(root).expanduser()
    found = [name for name in REVISITED if (root / name).is_dir()]
    if found:
        return found
    if root.name in REVISITED and (root / "jpg").is_dir():
        raise DataError(
            f"{where}: {root} is one of the sets; give the folder above, {root.parent}."
        )
    if not root.is_dir():
        raise DataError(f"{where}: {root} is no folder. {_revisited_layout('roxford5k')}")
    raise DataError(
        f"{where}: neither roxford5k nor rparis6k is in {root} ({contents(root)}). "
        f"{_revisited_layout('roxford5k')}"
    )


def read_revisited(root: str | Path, name: str, where: str) -> RevisitedSet:
    """The set `name` below `root`, checked completely except for the images' contents.

    Raises:
        DataError: no such folder, no or another ground truth, images that are missing.
    """
    folder = Path(root).expanduser() / name
    truth_file, pictures = folder / f"gnd_{name}.pkl", folder / "jpg"
    if not truth_file.is_file() or not pictures.is_dir():
        found = contents(folder) if folder.is_dir() else f"{folder} is no folder"
        raise DataError(
            f"{where}: {folder} lacks {'jpg/' if truth_file.is_file() else truth_file.name} "
            f"({found}). {_revisited_layout(name)}"
        )
    images, queries, entries = _check_truth(read_plain_pickle(truth_file, where), truth_file, where)
    judged = [
        {kind: _indices(entry, kind, len(images), q, truth_file, where) for kind in _JUDGED}
        for q, entry in enumerate(entries)
    ]
    result = RevisitedSet(
        name,
        [pictures / f"{image}.jpg" for image in images],
        [pictures / f"{query}.jpg" for query in queries],
        [_box(entry, q, truth_file, where) for q, entry in enumerate(entries)],
        judged,
    )
    require_files([*result.images, *result.queries], where, str(truth_file))
    return result


def _revisited_layout(name: str) -> str:
    return f"Expected: ROOT/{name}/gnd_{name}.pkl and ROOT/{name}/jpg/*.jpg."


def _check_truth(truth: Any, file: Path, where: str) -> tuple[list[str], list[str], list[Mapping]]:
    """The lists of the ground truth. Raises DataError where it is not what the benchmark says."""
    keys = ("imlist", "qimlist", "gnd")
    if not isinstance(truth, Mapping) or not all(key in truth for key in keys):
        found = f"keys {sorted(map(str, truth))[:8]}" if isinstance(truth, Mapping) else type(truth)
        raise DataError(
            f"{where}: {file} should hold a dict with {', '.join(keys)}; found {found}."
        )
    images, queries, entries = (list(truth[key]) for key in keys)
    for key, names in (("imlist", images), ("qimlist", queries)):
        wrong = [n for n in names if not isinstance(n, str) or not n or Path(n).name != n]
        if wrong or not names:
            raise DataError(
                f"{where}: {file}: {key} should be names such as 'all_souls_000013'; "
                f"found {wrong[0] if wrong else 'none'!r}."
            )
    if len(entries) != len(queries) or not all(isinstance(e, Mapping) for e in entries):
        raise DataError(
            f"{where}: {file}: gnd should hold one dict for each of the {len(queries)} queries; "
            f"found {len(entries)} entries."
        )
    return images, queries, entries


def _indices(
    entry: Mapping, kind: str, size: int, query: int, file: Path, where: str
) -> np.ndarray:
    try:
        values = np.asarray(entry[kind]).reshape(-1)
        indices = values.astype(np.int64)
        fits = values.size == 0 or (
            np.array_equal(values, indices) and indices.min() >= 0 and indices.max() < size
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise DataError(
            f"{where}: {file}: gnd[{query}][{kind!r}] should be whole numbers from 0 to "
            f"{size - 1}, indices into imlist; found {str(entry.get(kind, 'nothing'))[:80]}."
        )
    return indices


def _box(entry: Mapping, query: int, file: Path, where: str) -> Box:
    try:
        left, top, right, bottom = (float(v) for v in np.asarray(entry["bbx"]).reshape(-1))
        fits = left < right and top < bottom and np.isfinite([left, top, right, bottom]).all()
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise DataError(
            f"{where}: {file}: gnd[{query}]['bbx'] should be left, top, right, bottom in pixels; "
            f"found {str(entry.get('bbx', 'nothing'))[:80]}."
        )
    return left, top, right, bottom


@dataclass
class CopySet:
    """Copydays.

    Attributes:
        originals: the database.
        attacks: altered copies by the name of their folder ("strong", "crops/10", "jpeg/3").
        positives: for every attack and copy, int64 indices of its originals.
    """

    originals: list[Path]
    attacks: dict[str, list[Path]]
    positives: dict[str, list[np.ndarray]]


def read_copydays(root: str | Path, where: str) -> CopySet:
    """Copydays below `root`; any of the attacks may be absent, but not all.

    A copy belongs to the original that shares the first four digits of its name. JPEG copies lie
    in ``jpegqual/``, as in INRIA's archives, or in ``jpeg/``.

    Raises:
        DataError: no such folder, no originals, no attack, a name that belongs to no original.
    """
    root = Path(root).expanduser()
    if not (root / "original").is_dir():
        found = contents(root) if root.is_dir() else f"{root} is no folder"
        raise DataError(f"{where}: there is no {root / 'original'} ({found}). {_COPYDAYS_LAYOUT}")
    originals = _copies(root / "original", where)
    if not originals:
        raise DataError(
            f"{where}: {root / 'original'} holds no image ({contents(root / 'original')}). "
            f"{_COPYDAYS_LAYOUT}"
        )
    attacks = {name: _copies(folder, where) for name, folder in _attack_folders(root)}
    attacks = {name: copies for name, copies in attacks.items() if copies}
    if not attacks:
        raise DataError(
            f"{where}: {root} holds originals but no altered copies ({contents(root)}). "
            f"{_COPYDAYS_LAYOUT}"
        )
    blocks = np.array([_block(path) for path in originals])
    positives = {name: _positives(copies, blocks, where) for name, copies in attacks.items()}
    return CopySet(originals, attacks, positives)


_COPYDAYS_LAYOUT = (
    "Expected: ROOT/original/200000.jpg ..., and at least one of ROOT/strong/, "
    "ROOT/crops/10/ ... 80/, ROOT/jpegqual/3/ ... 75/ (or ROOT/jpeg/), each with *.jpg."
)


def _attack_folders(root: Path) -> list[tuple[str, Path]]:
    """Name and folder of every attack that is there, mildest number first."""
    found = [("strong", root / "strong")] if (root / "strong").is_dir() else []
    jpeg = "jpegqual" if (root / "jpegqual").is_dir() else "jpeg"
    for name, folder in (("crops", root / "crops"), ("jpeg", root / jpeg)):
        if folder.is_dir():
            levels = [f for f in folder.iterdir() if f.is_dir() and f.name.isdecimal()]
            found += [(f"{name}/{f.name}", f) for f in sorted(levels, key=lambda f: int(f.name))]
    return found


def _copies(folder: Path, where: str) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in (".jpg", ".jpeg")]
    strange = [f for f in files if not _COPY_NAME.fullmatch(f.stem)]
    if strange:
        raise DataError(
            f"{where}: {strange[0]} is not named as in Copydays, by six digits of which the first "
            f"four say the original (200001.jpg). {_COPYDAYS_LAYOUT}"
        )
    return files


def _block(path: Path) -> str:
    return path.name[:_BLOCK_DIGITS]


def _positives(copies: Sequence[Path], blocks: np.ndarray, where: str) -> list[np.ndarray]:
    found = [np.flatnonzero(blocks == _block(copy)) for copy in copies]
    for copy, originals in zip(copies, found, strict=True):
        if not len(originals):
            raise DataError(
                f"{where}: {copy} belongs to no original: none is named {_block(copy)}*.jpg."
            )
    return found
