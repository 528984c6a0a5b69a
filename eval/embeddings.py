"""Files of features: what `dino-kd embed` writes and `dino-kd search` reads.

One layout in three formats. Nothing is unpickled when a file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_kd.errors import ConfigError, DataError
from dino_kd.files import write_atomic, write_json, write_tensors

FORMATS = (".safetensors", ".npy", ".parquet")
INDEX = ".index.json"
CLS = "cls"
_KIND = "dino_kd embeddings"
_KEY = "dino_kd"  # under which the description lies in a file's metadata


@dataclass
class Embeddings:
    """Features of N images with what is known about them.

    Attributes:
        parts: ``[N, D]``, patches ``[N, P, D]``, float32 or float16.
        indices: int64 ``[N]``, positions in the data set.
        paths: where each image lies.
        labels: int64 ``[N]``, None when unknown.
        about: plain values: backbone, protocol, data set, class names, versions.
    """

    parts: dict[str, Tensor]
    indices: Tensor
    paths: list[str]
    labels: Tensor | None
    about: dict[str, Any]


def write_embeddings(path: Path, values: Embeddings) -> None:
    """Write one file (and for .npy its companions). Raises UserError, such as for a full disk."""
    about = {"kind": _KIND, **values.about}
    {".safetensors": _write_safetensors, ".npy": _write_npy, ".parquet": _write_parquet}[
        path.suffix
    ](path, values, about)


def write_index(path: Path, files: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """The list of the files of one set, ``{"file", "images"}`` each, beside them."""
    write_json(path, {"kind": _KIND, **about, "files": list(files)})


def check_parquet() -> None:
    """Raise ConfigError when pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(
            "output: .parquet needs pyarrow, which is not installed; run 'pip install "
            "dino_kd[parquet]' or choose .safetensors or .npy"
        ) from None


def is_embeddings(path: str) -> bool:
    """Whether `path` looks like such a file rather than like images."""
    return path.endswith((*FORMATS, INDEX)) and Path(path).expanduser().is_file()


def read_embeddings(path: Path, where: str) -> Embeddings:
    """The `cls` features of one file, or of all files of an index; float32.

    Raises DataError, naming the setting `where`: not such a file, damaged, without `cls`.
    """
    try:
        if path.name.endswith(INDEX):
            return _read_all(path, where)
        if path.suffix == ".parquet":
            check_parquet()
        read = {".safetensors": _read_safetensors, ".npy": _read_npy, ".parquet": _read_parquet}
        return read[path.suffix](path, where)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{where}: {path} cannot be read as embeddings ({error})") from error


def _read_all(path: Path, where: str) -> Embeddings:
    about = _checked(json.loads(path.read_text(encoding="utf-8")), path, where)
    pieces = [read_embeddings(path.parent / entry["file"], where) for entry in about.pop("files")]
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return Embeddings(
        {CLS: torch.cat([piece.parts[CLS] for piece in pieces])},
        torch.cat([piece.indices for piece in pieces]),
        [name for piece in pieces for name in piece.paths],
        torch.cat(labels) if len(labels) == len(pieces) else None,
        about,
    )


def _write_safetensors(path: Path, values: Embeddings, about: dict[str, Any]) -> None:
    block = b"\0".join(os.fsencode(name) for name in values.paths)
    tensors = {**values.parts, "indices": values.indices}
    tensors["paths"] = torch.frombuffer(bytearray(block or b"\0"), dtype=torch.uint8)
    if values.labels is not None:
        tensors["labels"] = values.labels
    write_tensors(path, tensors, {_KEY: json.dumps(about)})


def _read_safetensors(path: Path, where: str) -> Embeddings:
    with safe_open(path, "pt") as file:
        about = _checked(json.loads((file.metadata() or {}).get(_KEY, "{}")), path, where)
        names = bytes(file.get_tensor("paths").numpy()).split(b"\0")
        return Embeddings(
            {CLS: file.get_tensor(CLS).float()},
            file.get_tensor("indices"),
            [os.fsdecode(name) for name in names],
            file.get_tensor("labels") if "labels" in file.keys() else None,  # noqa: SIM118
            about,
        )


def _write_npy(path: Path, values: Embeddings, about: dict[str, Any]) -> None:
    (part,) = values.parts.values()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, part.numpy())

    write_atomic(path, write)
    lines = b"".join(os.fsencode(name) + b"\n" for name in values.paths)
    write_atomic(path.with_suffix(".paths.txt"), lambda temporary: _write_bytes(temporary, lines))
    labels = None if values.labels is None else values.labels.tolist()
    more = {"indices": values.indices.tolist(), "labels": labels}
    write_json(path.with_suffix(".json"), about | more)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _read_npy(path: Path, where: str) -> Embeddings:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise DataError(
            f"{where}: {beside.name} is missing beside {path}; it says which backbone made the "
            "features"
        )
    about = _checked(json.loads(beside.read_text(encoding="utf-8")), path, where)
    features = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    names = path.with_suffix(".paths.txt").read_bytes().split(b"\n")[:-1]
    labels = about.pop("labels")
    return Embeddings(
        {CLS: features},
        torch.tensor(about.pop("indices")),
        [os.fsdecode(name) for name in names],
        None if labels is None else torch.tensor(labels),
        about,
    )


def _write_parquet(path: Path, values: Embeddings, about: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    names = values.about.get("class_names")
    columns: dict[str, Any] = {
        "path": [os.fsencode(name).decode("utf-8", "backslashreplace") for name in values.paths],
        "index": values.indices.numpy(),
    }
    if values.labels is not None:
        columns["label"] = values.labels.numpy()
        if names:
            columns["class_name"] = [names[label] for label in values.labels.tolist()]
    for name, part in values.parts.items():
        flat = part.flatten(1)
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(flat.reshape(-1).numpy()), flat.shape[1]
        )
    table = pyarrow.table(columns).replace_schema_metadata({_KEY: json.dumps(about)})
    write_atomic(path, lambda temporary: parquet.write_table(table, temporary))


def _read_parquet(path: Path, where: str) -> Embeddings:
    from pyarrow import parquet

    schema = parquet.read_schema(path)
    about = _checked(json.loads((schema.metadata or {}).get(_KEY.encode(), b"{}")), path, where)
    wanted = [n for n in ("path", "index", "label", CLS) if n in schema.names]
    table = parquet.read_table(path, columns=wanted)
    features = table[CLS].combine_chunks()
    return Embeddings(
        {CLS: torch.from_numpy(features.flatten().to_numpy().copy()).view(len(table), -1).float()},
        torch.from_numpy(table["index"].to_numpy().copy()),
        table["path"].to_pylist(),
        torch.from_numpy(table["label"].to_numpy().copy()) if "label" in wanted else None,
        about,
    )


def _checked(about: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """`about`, if it is ours and holds `cls`. Raises DataError."""
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise DataError(
            f"{where}: {path} was not written by 'dino-kd embed'; give such a file or a dataset "
            "spec"
        )
    if CLS not in about["parts"]:
        raise DataError(
            f"{where}: {path} holds {', '.join(about['parts'])}, and cls is needed; write it with "
            "'dino-kd embed parts=[cls]'"
        )
    return {key: value for key, value in about.items() if key != "kind"}
