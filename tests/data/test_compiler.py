"""Compiling at first use: once, by several processes at once, and not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_kd.data import compiler
from dino_kd.data.compiler import CannotCompileError, compiled, compilers
from dino_kd.data.native import NativeRenderer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, on disk and in memory; and no wheel, of which each compilation takes long."""
    monkeypatch.setattr(compiler, "_WHEEL", "some_wheel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.cache_clear()
    yield tmp_path / "cache/dino_kd/native"
    compiled.cache_clear()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in no time, in place of the shipped ones."""
    try:
        compilers()
    except CannotCompileError as error:
        pytest.skip(str(error))
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    return source


def files_of(cache: Path) -> list[Path]:
    """What lies in the cache besides its lock."""
    return [file for file in cache.iterdir() if file.name != ".lock"]


def test_a_source_is_compiled_once_and_again_when_it_changes(small: Path, cache: Path) -> None:
    first = compiled("small.cpp")
    made = first.stat().st_mtime_ns
    compiled.cache_clear()
    assert compiled("small.cpp") == first
    assert first.stat().st_mtime_ns == made
    small.write_text('extern "C" int answer() { return 43; }\n')
    compiled.cache_clear()
    assert compiled("small.cpp") != first
    assert len(files_of(cache)) == 2  # nothing half-made is left


@pytest.mark.parametrize("changed", ["_processor", "_version"])
def test_another_processor_or_compiler_compiles_anew(
    small: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled("small.cpp")
    compiled.cache_clear()
    monkeypatch.setattr(compiler, changed, lambda *_: "another")
    assert compiled("small.cpp") != first


def test_a_source_that_does_not_compile_gives_the_reason(small: Path, cache: Path) -> None:
    small.write_text("int main( {\n")
    with pytest.raises(CannotCompileError, match="failed: "):
        compiled("small.cpp")
    assert files_of(cache) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        CannotCompileError, match=r"no C\+\+ compiler is installed .*pip install some_wheel"
    ):
        NativeRenderer()
    monkeypatch.setenv("CXX", "gcc-of-mine")
    with pytest.raises(CannotCompileError, match="CXX names gcc-of-mine, which is not installed"):
        NativeRenderer()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the wheel's name whose `python -m` answers by the compiler of this machine."""
    package = tmp_path / "site/some_wheel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    told = tmp_path / "told"
    (package / "__main__.py").write_text(
        "import os, pathlib, subprocess, sys\n"
        "scratch = os.environ.get('ZIG_GLOBAL_CACHE_DIR', '')\n"
        f"with open({str(told)!r}, 'a') as told:\n"
        "    told.write(' '.join([*sys.argv[1:], scratch]) + '\\n')\n"
        "if scratch:\n"
        "    pathlib.Path(scratch, 'libc++.a').write_text('large')\n"
        "sys.exit(subprocess.call(['c++', *sys.argv[2:]]))\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.delenv("CXX", raising=False)
    return told


def test_the_compiler_of_the_wheel_comes_first(
    small: Path, wheel: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctypes.CDLL(str(compiled("small.cpp"))).answer() == 42
    lines = wheel.read_text().splitlines()
    assert all(line.startswith("c++ ") for line in lines)
    assert "-march=native" in lines[-1]
    assert str(cache) in lines[-1].split()[-1]  # its own cache lies where it can be written ...
    assert [file.suffix for file in files_of(cache)] == [".so"]  # ... and is not left there
    assert "once for this machine" in capsys.readouterr().err


def test_cxx_comes_before_the_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compilers()[0] == [sys.executable, "-m", "some_wheel", "c++"]
    monkeypatch.setenv("CXX", "c++")
    assert compilers() == [[shutil.which("c++")]]
    monkeypatch.setenv("CXX", "'c++")
    with pytest.raises(CannotCompileError, match="CXX cannot be read"):
        compilers()
    monkeypatch.setenv("CXX", "c++ -pipe")
    assert compilers() == [[shutil.which("c++"), "-pipe"]]


def test_a_wheel_that_does_not_work_gives_way(
    small: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = tmp_path / "site/some_wheel/__main__.py"
    main.write_text("raise SystemExit('no such processor')\n")
    assert ctypes.CDLL(str(compiled("small.cpp"))).answer() == 42
    compiled.cache_clear()
    small.write_text("int main( {\n")
    with pytest.raises(CannotCompileError, match="some_wheel c\\+\\+ failed: no such processor"):
        compiled("small.cpp")


def test_a_folder_of_the_wheels_name_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_wheel").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCompileError, match="no C"):
        compilers()


@pytest.mark.slow
def test_the_wheel_itself_compiles_the_crops(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: the kernel that it makes agrees with Pillow, or this would raise."""
    pytest.importorskip("ziglang")
    monkeypatch.setattr(compiler, "_WHEEL", "ziglang")
    monkeypatch.delenv("CXX", raising=False)
    NativeRenderer()
    assert [file.suffix for file in files_of(cache)] == [".so"]


def test_a_broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no licence today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CannotCompileError, match="broken failed: no licence today"):
        NativeRenderer()


def test_a_cache_that_cannot_be_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CannotCompileError, match="cache cannot be used"):
        compiled("small.cpp")


def test_several_processes_compile_at_once(small: Path, cache: Path) -> None:
    """Each ends with a library that works, and one file is left."""
    program = (
        "import ctypes; from dino_kd.data import compiler; "
        f"compiler.__file__ = {str(small.with_name('compiler.py'))!r}; "
        "print(ctypes.CDLL(str(compiler.compiled('small.cpp'))).answer())"
    )
    root = Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=root, env={**os.environ, "CXX": compilers()[0][0]},
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.communicate()[0].strip() for process in running] == ["42", "42"]
    assert len(files_of(cache)) == 1
