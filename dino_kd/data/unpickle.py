"""Read pickled plain data without running anything that the file asks for.

Some benchmarks hand out their ground truth as a pickle. What such a file may build is listed here:
numbers, strings, lists, tuples, dicts, sets and numpy arrays. Everything else is refused.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from dino_kd.errors import DataError

# What damaged or hostile bytes make the unpickler and numpy raise.
_FAILURES = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError,
    MemoryError, OverflowError, TypeError, ValueError, struct.error,
)  # fmt: skip
_NUMPY_CORES = ("numpy.core", "numpy._core")  # before and since numpy 2


def read_plain_pickle(path: str | Path, where: str) -> Any:
    """The containers, numbers, strings and arrays of a pickle file.

    Written by any Python: strings of Python 2 are read as Latin-1.

    Raises:
        DataError: the file is missing or truncated, or asks for anything else to be built; the
            message names it. Nothing has run then.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot read {path}: {error.strerror}.") from error
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _Refused as refused:
        raise DataError(
            f"{where}: {path} asks Python for {refused.name}, and ground truth needs numbers, "
            "strings, lists, dicts and numpy arrays only. The file was not loaded: it is not the "
            "official one, or has been tampered with."
        ) from None
    except _FAILURES as error:
        raise DataError(
            f"{where}: {path} ({len(data):,} bytes) is no complete pickle file "
            f"({' '.join(str(error).split()) or type(error).__name__}); copy or download it again."
        ) from error


class _Refused(Exception):  # noqa: N818 - reads as what it is
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The few callables that plain data and arrays are made of."""
        core, _, last = module.rpartition(".")
        if core in _NUMPY_CORES and (last, name) in _NUMPY:
            return _NUMPY[last, name]
        # Python 2 has another name for the built-ins; protocols before 3 keep it
        key = ("builtins" if module == "__builtin__" else module, name)
        if key in _OTHERS:
            return _OTHERS[key]
        raise _Refused(f"{module}.{name}")


class _Array(np.ndarray):
    """An array whose contents arrive after it was made, as numpy pickles arrays."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, contents = state
        dtype = _clean(dtype)
        if dtype.hasobject and not isinstance(contents, list):
            raise ValueError("an array of objects without a list of them")
        super().__setstate__((version, shape, dtype, is_fortran, contents))


def _clean(dtype: Any) -> np.dtype:
    """The same type of elements, made anew: a pickle may have changed what is inside of it."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in _KINDS or dtype.fields is not None:
        raise ValueError(f"an array of {dtype!r}")
    return np.dtype("O" if dtype.kind == "O" else dtype.str)


def _dtype(name: Any, *_: Any) -> np.dtype:
    """A copy: what the pickle does to it must not reach numpy's own."""
    if not isinstance(name, str):
        raise ValueError(f"an array of {name!r}")
    return np.dtype(name, False, True)


def _array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """An empty array, its contents follow; those of Python 2 say so by a byte string."""
    if kind != _KIND_OF_ARRAY or shape not in ((0,), 0):
        raise ValueError("an array of an unusual kind")
    return np.ndarray.__new__(_Array, (0,), "b")


def _array_of_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A contiguous array, as numpy pickles it since protocol 5."""
    return np.frombuffer(buffer, dtype=_clean(dtype)).reshape(shape, order=order)


def _number(dtype: Any, value: Any) -> Any:
    """A numpy number."""
    raw = value.encode("latin-1") if isinstance(value, str) else value
    return np.frombuffer(raw, dtype=_clean(dtype), count=1)[0]


def _decoded(text: Any, encoding: Any) -> bytes:
    """Bytes as Python 3 writes them for the old protocols: Latin-1 text to be encoded."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """What ``bytes()`` gives; the real one would fill memory for ``bytes(10**12)``."""
    return b""


_KINDS = frozenset("biufSUO")  # numbers, strings, and lists seen as arrays
_KIND_OF_ARRAY = "numpy.ndarray"  # stands for the class, which itself cannot be called then
_NUMPY = {
    ("multiarray", "_reconstruct"): _array,
    ("multiarray", "scalar"): _number,
    ("numeric", "_frombuffer"): _array_of_buffer,
}
_OTHERS = {
    ("numpy", "ndarray"): _KIND_OF_ARRAY,
    ("numpy", "dtype"): _dtype,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _decoded,
}
