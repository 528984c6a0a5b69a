"""The package: what it declares, and a wheel that works from any folder."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dino_kd import __version__

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {"PIL": "pillow", "faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "PyYAML"}
OPTIONAL = {"tensorboard", "wandb", "mlflow"}  # asked for before use, absent without harm


def setup_arguments(tmp_path: Path) -> dict[str, object]:
    """What setup.py hands to setuptools, by running it with `setup` replaced."""
    code = (
        "import json, runpy, setuptools; got = {}; setuptools.setup = got.update;"
        f"runpy.run_path({str(ROOT / 'setup.py')!r}); print(json.dumps(got))"
    )
    import json

    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return json.loads(done.stdout)


def test_version_is_read_from_the_source(tmp_path: Path) -> None:
    assert setup_arguments(tmp_path)["version"] == __version__


def test_requirements_have_lower_bounds_only(tmp_path: Path) -> None:
    got = setup_arguments(tmp_path)
    assert got["python_requires"] == ">=3.10"
    for line in got["install_requires"]:  # type: ignore[attr-defined]
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=[\d.]+", line), line
    assert {"test", "dev", "export", "video"} <= set(got["extras_require"])  # type: ignore[call-overload]


def test_everything_imported_is_declared(tmp_path: Path) -> None:
    """Imports of all shipped modules against install_requires and the extras."""
    got = setup_arguments(tmp_path)
    shipped = ("export", "parquet", "video")
    extras = [line for name in shipped for line in got["extras_require"][name]]  # type: ignore[index]
    declared = {
        re.split("[>=]", line)[0].lower()
        for line in [*got["install_requires"], *extras]  # type: ignore[misc]
    }
    ours = {"dino_kd", "eval", "launch"}
    for folder in ours:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for name in {n.partition(".")[0] for n in names} - ours - OPTIONAL:
                    if name not in sys.stdlib_module_names:
                        wanted = DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
                        assert wanted in declared, f"{file}: {name} is not in setup.py"


def test_only_our_packages_are_installed(tmp_path: Path) -> None:
    packages = setup_arguments(tmp_path)["packages"]
    assert {"dino_kd", "dino_kd.data", "dino_kd.configs", "eval", "launch"} <= set(packages)  # type: ignore[call-overload]
    assert {p.partition(".")[0] for p in packages} == {"dino_kd", "eval", "launch"}  # type: ignore[attr-defined]


def test_packages_that_others_may_overwrite_hold_a_docstring_only() -> None:
    """`eval` and `launch` are common names; ours survive a foreign __init__.py in their place."""
    for name in ("eval", "launch"):
        body = ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8")).body
        assert all(
            isinstance(node, ast.Expr)
            or (isinstance(node, ast.ImportFrom) and node.module == "__future__")
            for node in body
        )


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_makefile_targets_exist_and_ci_uses_them() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ["demo", "test", "test-all", "lint", "format", "bench", "docs", "wheel", "check"]:
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE), target
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "set -euo pipefail" in ci.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        ({"version_info": 1}, ["needs Python 3.10 or newer", "Python 3.8.9", "make PYTHON="]),
        ({"ensurepip": 1}, ["python3-venv"]),
    ],
)
def test_make_says_what_an_unfit_python_lacks(
    tmp_path: Path, answers: dict[str, int], parts: list[str]
) -> None:
    """A stand-in interpreter that fails one of the two questions."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    python = tmp_path / "python"
    cases = "".join(f"*{word}*) exit {code};;\n" for word, code in answers.items())
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n{cases}--version) echo Python 3.8.9;;\nesac\nexit 0\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    for part in parts:
        assert part in done.stdout


def test_make_says_when_there_is_no_python(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(
        ["make", "test", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "no-such-python is not installed" in done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files and scripts, built from a copy of the tree."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "tests", "__pycache__", "*.egg-info", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=skip)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(base), str(source)]
    subprocess.run(wheel, check=True, capture_output=True, text=True)
    (file,) = base.glob("*.whl")
    target = base / "installed"
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(file)], check=True)
    return target


def run_installed(installed: Path, cwd: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    script = str(installed / "bin" / "dino-kd")
    assert run_installed(installed, tmp_path, script, "--version") == f"dino-kd {__version__}\n"
    assert "usage: dino-kd knn" in run_installed(installed, tmp_path, script, "knn", "--help")
    shown = ["input=synthetic:textures:test:3", "backbone=random:resnet10t", "device=cpu"]
    run_installed(installed, tmp_path, script, "visualize", *shown)
    assert "What random:resnet10t sees" in (tmp_path / "visualize" / "index.html").read_text()
    code = (
        "import dino_kd.config as c; names = c.packaged_configs(); print(*names);"
        "print(c.__file__, *map(c.find_config, names), sep='\\n')"
    )
    names, *files = run_installed(installed, tmp_path, sys.executable, "-c", code).splitlines()
    in_checkout = {
        file.relative_to(ROOT / "configs").with_suffix("").as_posix()
        for file in (ROOT / "configs").glob("*/*.yaml")
    }
    assert set(names.split()) == in_checkout
    assert all(file.startswith(str(installed)) for file in files)


@pytest.mark.slow
def test_the_wheel_holds_no_tests_and_knows_its_types(installed: Path) -> None:
    assert (installed / "dino_kd" / "py.typed").is_file()
    assert (installed / "dino_kd" / "data" / "crops.cpp").is_file()
    assert (installed / "eval" / "templates" / "visualize.html").is_file()
    assert not (installed / "tests").exists()
    assert not (installed / "configs").exists()


@pytest.mark.slow
def test_a_foreign_eval_beside_the_caller_does_not_shadow_the_script(
    installed: Path, tmp_path: Path
) -> None:
    """The folder one stands in is not on a console script's path; our own eval is found."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise RuntimeError('foreign')")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [str(installed / "bin" / "dino-kd"), "knn", "nosuch=1"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "nosuch: unknown setting" in done.stderr
