"""Compile C++ that is shipped as text: once for each machine and version, into the user's cache.

Code for the very processor it runs on is twice as fast as code for any, and this way an
installation needs no compiler: without one, callers do without the compiled code. A wheel can bring
one along: clang inside `ziglang`, the extra `compiler`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dino_kd.cache_entries import cache_folder
from dino_kd.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no flock; there each process compiles for itself
    fcntl = None  # type: ignore[assignment]

_COMPILERS = ("g++", "clang++", "c++")
_WHEEL = "ziglang"
# Sums keep their order; the code has neither infinities nor use for the sign of a zero.
_FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-ffinite-math-only", "-fno-signed-zeros", "-w",
)  # fmt: skip
_MACHINE_FLAGS = ("-march=native", "-mcpu=native")  # the first that the compiler takes
_TIME_LIMIT_S = 600  # the wheel builds its C++ library first, which takes a minute


class CannotCompileError(Exception):
    """No compiled code on this machine; the message says why, in one line."""


@functools.cache
def compiled(name: str) -> Path:
    """The shared library made of the source file `name` in this folder.

    Made when this source, compiler and processor have not met before. A compiler that fails gives
    way to the next. Of several processes that ask at once, one compiles and the others wait.

    Raises:
        CannotCompileError: no compiler, all fail (the first complaint), or the cache cannot be
            written.
    """
    complaints = []
    for compiler in compilers():
        try:
            return _compiled_by(compiler, Path(__file__).with_name(name))
        except CannotCompileError as error:
            complaints.append(error)
    raise complaints[0]


def _compiled_by(compiler: list[str], source: Path) -> Path:
    text = "\n".join([_version(compiler), _processor(), *_FLAGS, *_MACHINE_FLAGS])
    key = hashlib.sha256(source.read_bytes() + text.encode()).hexdigest()[:20]
    try:
        folder = cache_folder("auto", "native")
        assert folder is not None  # only for "off"
        library = folder / f"{source.stem}-{key}.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(folder):
                if not library.is_file():
                    _compile(compiler, source, library)
    except (OSError, ConfigError) as error:
        raise CannotCompileError(f"its folder in the cache cannot be used ({error})") from None
    return library


def compilers() -> list[list[str]]:
    """Commands of the C++ compilers here, to be tried in turn: $CXX alone, or all that are known.

    The wheel comes first because it was installed for this, and its code is faster than that of
    g++ 12 (docs/results.md).

    Raises CannotCompileError when there is none.
    """
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))  # "ccache g++" is usual
    except ValueError as error:
        raise CannotCompileError(f"the environment variable CXX cannot be read: {error}") from None
    if wanted:
        path = shutil.which(wanted[0])
        if path is None:
            raise CannotCompileError(
                f"the environment variable CXX names {wanted[0]}, which is not installed; correct "
                "or unset it"
            )
        return [[path, *wanted[1:]]]
    wheel = importlib.util.find_spec(_WHEEL)  # without an origin it is a folder of that name
    found = [[sys.executable, "-m", _WHEEL, "c++"]] if wheel and wheel.origin else []
    found += [[path] for name in _COMPILERS if (path := shutil.which(name))]
    if not found:
        raise CannotCompileError(
            f"no C++ compiler is installed (looked for {', '.join([_WHEEL, *_COMPILERS])}); "
            f"pip install {_WHEEL} brings one"
        )
    return found


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes of a job wait for the first one's library, where files can be locked."""
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    if _WHEEL in compiler:
        told = f"compiling {source.name}, once for this machine; takes about a minute"
        sys.stderr.write(told + "\n")
    with tempfile.TemporaryDirectory(
        dir=library.parent, prefix=".", ignore_cleanup_errors=True
    ) as folder:
        made, complaint = Path(folder, library.name), ""
        for machine in _MACHINE_FLAGS:
            done = _run([*compiler, *_FLAGS, machine, "-o", str(made), str(source)], Path(folder))
            if done.returncode == 0:
                made.replace(library)
                return
            complaint = complaint or done.stderr.strip()
    last = complaint.splitlines()[-1] if complaint else "without a message"
    raise CannotCompileError(f"{' '.join(compiler)} failed: {last}")


def _version(compiler: list[str]) -> str:
    if _WHEEL in compiler:  # it need not be started for that, which leaves files behind
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{_WHEEL} {importlib.metadata.version(_WHEEL)}"
    return " ".join(compiler) + _run([*compiler, "--version"]).stdout


def _run(command: list[str], scratch: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler; the wheel's keeps 80 MB of its own in `scratch`, instead of the home."""
    kept = {f"ZIG_{kind}_CACHE_DIR": str(scratch) for kind in ("GLOBAL", "LOCAL") if scratch}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False,
            errors="replace", env={**os.environ, **kept},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompileError(f"{command[0]} failed: {error}") from None


def _processor() -> str:
    """What `-march=native` depends on: homes are shared between unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "cpu family", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({x for x in lines if x.startswith(kinds)})])
