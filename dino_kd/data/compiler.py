"""Compile C++ that is shipped as text: once for each machine and version, into the user's cache.

Code for the very processor it runs on is twice as fast as code for any, and this way an
installation needs no compiler: without one, callers do without the compiled code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from dino_kd.cache_entries import cache_folder
from dino_kd.errors import ConfigError

_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
_MACHINE_FLAGS = ("-march=native", "-mcpu=native")  # the first that the compiler takes
_TIME_LIMIT_S = 180


class CannotCompileError(Exception):
    """No compiled code on this machine; the message says why, in one line."""


@functools.cache
def compiled(name: str) -> Path:
    """The shared library made of the source file `name` in this folder.

    Made when this source, compiler and processor have not met before. Several processes may ask at
    once: each compiles into a file of its own and then renames it, which replaces it in one go.

    Raises:
        CannotCompileError: no compiler, it fails, or the cache cannot be written.
    """
    source = Path(__file__).with_name(name)
    compiler = find_compiler()
    text = "\n".join([_version(compiler), _processor(), *_FLAGS, *_MACHINE_FLAGS])
    key = hashlib.sha256(source.read_bytes() + text.encode()).hexdigest()[:20]
    try:
        folder = cache_folder("auto", "native")
        assert folder is not None  # only for "off"
        library = folder / f"{source.stem}-{key}.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, library)
    except (OSError, ConfigError) as error:
        raise CannotCompileError(f"its folder in the cache cannot be used ({error})") from None
    return library


def find_compiler() -> str:
    """The path of a C++ compiler: $CXX, or the first of the usual names.

    Raises CannotCompileError when there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise CannotCompileError(f"no C++ compiler is installed (looked for {', '.join(names)})")


def _compile(compiler: str, source: Path, library: Path) -> None:
    handle, name = tempfile.mkstemp(dir=library.parent, prefix=".", suffix=".so")
    os.close(handle)
    temporary = Path(name)
    try:
        complaint = ""
        for machine in _MACHINE_FLAGS:
            command = [compiler, *_FLAGS, machine, "-o", str(temporary), str(source)]
            done = _run(command)
            if done.returncode == 0:
                temporary.replace(library)
                return
            complaint = complaint or done.stderr.strip()
        last = complaint.splitlines()[-1] if complaint else "without a message"
        raise CannotCompileError(f"{compiler} failed: {last}")
    finally:
        temporary.unlink(missing_ok=True)


def _version(compiler: str) -> str:
    return compiler + _run([compiler, "--version"]).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False,
            errors="replace",
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
