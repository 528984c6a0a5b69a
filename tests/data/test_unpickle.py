"""Plain data comes back from every protocol; anything that could run is refused, unexecuted."""

from __future__ import annotations

import os
import pickle
import re
import subprocess

import numpy as np
import pytest

from dino_kd.data.unpickle import read_plain_pickle
from dino_kd.errors import DataError

PLAIN = {
    "imlist": ["all_souls_000013", "café"],
    "gnd": [
        {
            "bbx": [136.5, 34.1, 648.5, 955.7],
            "easy": np.array([3, 1, 4], dtype=np.int64),
            "hard": np.array([], dtype=np.int32),
            "junk": np.arange(6, dtype=np.uint16).reshape(2, 3).T,  # not contiguous
        }
    ],
    "numbers": (1, -(2**40), 0.5, True, None, np.float32(0.25), np.int64(7)),
    "more": [{1, 2}, frozenset({3}), b"", b"\xff\x00", np.array(["a", "bc"])],
}


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(tmp_path, protocol):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(PLAIN, protocol))
    assert same(read_plain_pickle(path, "root"), PLAIN)


def test_numpy_of_both_generations_is_understood(tmp_path):
    """The module of numpy 1 is renamed in the text of protocol 0."""
    path = tmp_path / "gnd.pkl"
    data = pickle.dumps(np.arange(5), protocol=0)
    old = data.replace(b"numpy._core", b"numpy.core")
    new = data.replace(b"numpy.core", b"numpy._core")
    assert old != new
    for written in (old, new):
        path.write_bytes(written)
        assert read_plain_pickle(path, "root").tolist() == [0, 1, 2, 3, 4]


def test_strings_and_arrays_of_python_2_are_understood(tmp_path):
    """Python 2 wrote byte strings, also for the contents of an array (here int64 [1, 200])."""
    path = tmp_path / "gnd.pkl"
    contents = np.array([1, 200], dtype="<i8").tobytes()
    dtype = (
        b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85" + dtype + b"\x89U" + bytes([len(contents)]) + contents + b"tb"
    )
    path.write_bytes(b"\x80\x02}(U\x04easy" + array + b"U\x04nameU\x04caf\xe9u.")
    found = read_plain_pickle(path, "root")
    assert found["easy"].tolist() == [1, 200]
    assert found["name"] == "café"


class Runs:
    """On loading, an ordinary unpickler calls `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (exec, "exec"), (subprocess.Popen, "Popen")],
)
def test_nothing_runs(tmp_path, protocol, function, name):
    marker = tmp_path / "ran"
    argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    if function is subprocess.Popen:
        argument = ["touch", str(marker)]
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": [Runs(function, argument)]}, protocol))
    with pytest.raises(DataError, match=rf"root: .*gnd\.pkl asks Python for \w+\.{name}"):
        read_plain_pickle(path, "root")
    assert not marker.exists()
    if function is os.system:  # the same bytes are live ammunition elsewhere
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    "written",
    [
        b"cnumpy.testing\nmeasure\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy.core.multiarray.umath\n_reconstruct\n.",
        b"cbuiltins\ngetattr\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",  # dotted names reach attributes
    ],
)
def test_neighbours_of_what_is_accepted_are_refused(tmp_path, written):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(written)
    with pytest.raises(DataError, match="asks Python for"):
        read_plain_pickle(path, "root")


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"not a pickle",
        b"PK\x03\x04",
        pickle.dumps(PLAIN)[:-40],
        pickle.dumps(PLAIN, 2)[:200],
        b"cbuiltins\nbytes\nI1000000000000\n\x85R.",  # would fill the memory
        b"c_codecs\nencode\n(Vabc\nVidna\ntR.",
        b"}Na.",
        # arrays of raw pointers: an object type whose contents are bytes
        b"cnumpy.core.numeric\n_frombuffer\n(B\x08\x00\x00\x00AAAAAAAA"
        b"cnumpy\ndtype\n(VO\ntR(K\x01tVC\ntR.",
        b"cnumpy\nndarray\n(I1000000000000\ntR.",
        b"cnumpy\ndtype\n(]tR.",
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, written):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(written)
    with pytest.raises(DataError, match=r"no complete pickle file .* download it again"):
        read_plain_pickle(path, "root")


def test_an_array_of_objects_needs_a_list_of_them(tmp_path):
    """Bytes in its place would be taken for addresses."""
    path = tmp_path / "gnd.pkl"
    written = pickle.dumps(np.array([None], dtype=object), protocol=2)
    assert b"]" in written
    path.write_bytes(written)
    assert read_plain_pickle(path, "root").tolist() == [None]
    path.write_bytes(re.sub(rb"\](q.)?Na", b"U\x08AAAAAAAA", written, flags=re.DOTALL))
    assert path.read_bytes() != written
    with pytest.raises(DataError, match="an array of objects without a list"):
        read_plain_pickle(path, "root")


def test_numpys_own_types_stay_as_they_are(tmp_path):
    """A pickle that turns int64 to big-endian turns its own copy only."""
    path = tmp_path / "gnd.pkl"
    path.write_bytes(
        b"cnumpy\ndtype\n(Vi8\nI00\nI00\ntR(K\x03V>\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."
    )
    assert read_plain_pickle(path, "root").str == ">i8"
    assert np.dtype("i8").byteorder == "="


def test_every_truncation_is_one_sentence(tmp_path):
    path = tmp_path / "gnd.pkl"
    whole = pickle.dumps(PLAIN, 4)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_plain_pickle(path, "root")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"root: cannot read .*gnd\.pkl: No such file"):
        read_plain_pickle(tmp_path / "gnd.pkl", "root")
