"""Extracted features on disk, so that the second evaluator on the same images costs seconds.

An entry is one folder, named by a hash of everything that shapes the features: weights,
transform, arithmetic, images. One safetensors file for each part; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_kd.cache_entries import ABOUT, GIGABYTE, make_room, mark_used
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.fingerprint import text_fingerprint
from dino_kd.data.images import BrokenImage
from dino_kd.distributed import all_gather_objects, broadcast, is_main_process, on_main
from dino_kd.features import OUTPUT, FeatureBank
from dino_kd.files import remove_leftovers, write_json, write_tensors

_FORMAT = 1  # raise it when the same identity would give other numbers


class FeatureCache:
    """A folder of feature banks with a limit on its size.

    Under torchrun every process calls the same methods; the main one writes.
    """

    def __init__(self, folder: str | Path, *, limit_gb: float = 20.0) -> None:
        self.folder = Path(folder)
        self.limit = limit_gb * GIGABYTE

    def fetch(
        self,
        dataset: ImageDataset,
        identity: Mapping[str, Any],
        parts: Sequence[str],
        extract: Callable[[Sequence[str]], FeatureBank],
    ) -> FeatureBank:
        """The features of `dataset`, from disk when all `parts` are there, else by `extract`.

        Args:
            dataset: where the images, and the labels, come from.
            identity: plain values that fix weights, transform and arithmetic.
            parts: names as in `Backbone.parts`; ``output`` always comes along.
            extract: computes the parts that it is given, `output` first.

        Raises:
            UserError: the disk is full, or whatever `extract` raises.
        """
        wanted = [OUTPUT, *(name for name in parts if name != OUTPUT)]
        about = {"format": _FORMAT, **identity, "images": broadcast(_on_main(dataset.fingerprint))}
        entry = self.folder / text_fingerprint(json.dumps(about, sort_keys=True))[:32]
        bank = _read(entry, wanted, dataset)
        if all(all_gather_objects([bank is not None])):
            assert bank is not None
            if is_main_process():
                mark_used(entry)
            return bank
        bank = extract(wanted)
        on_main(lambda: self._write(entry, about, bank))
        return bank

    def _write(self, entry: Path, about: Mapping[str, Any], bank: FeatureBank) -> None:
        """Store every part, the identity last, and make room for them."""
        values = {OUTPUT: bank.features, **bank.parts}
        size = sum(v.numel() * v.element_size() for v in values.values())
        if size > self.limit:
            return
        broken = json.dumps([[b.path, b.reason] for b in bank.broken])
        for name, features in values.items():
            tensors = {"features": features, "indices": bank.indices}
            write_tensors(_file(entry, name), tensors, {"broken": broken}, setting="cache")
        write_json(entry / ABOUT, about)
        remove_leftovers(entry)
        make_room(self.folder, self.limit, keep=entry)


def _on_main(work: Callable[[], str]) -> str:
    return work() if is_main_process() else ""


def _file(entry: Path, part: str) -> Path:
    return entry / f"{part}.safetensors"


def _read(entry: Path, parts: Sequence[str], dataset: ImageDataset) -> FeatureBank | None:
    """All parts, or None when one is absent, damaged, or of other images than the rest."""
    values: dict[str, Tensor] = {}
    indices: Tensor | None = None
    broken = "[]"
    try:
        for name in parts:
            with safe_open(_file(entry, name), "pt") as file:
                rows = file.get_tensor("indices")
                if indices is not None and not torch.equal(rows, indices):
                    return None
                indices, values[name] = rows, file.get_tensor("features")
                broken = (file.metadata() or {}).get("broken", "[]")
    except (OSError, SafetensorError, ValueError):
        return None
    assert indices is not None  # `output` is always among the parts
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[indices]
    found = [BrokenImage(path, reason) for path, reason in json.loads(broken)]
    output = values.pop(OUTPUT)
    return FeatureBank(output, labels, indices, found, values, cached=True)
