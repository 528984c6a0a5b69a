"""The table of layers in docs/design.md, held against the imports of every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dino_kd.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

# Longest match wins; a module may import lower layers, its own package, and within layer 0.
LAYERS = {
    "dino_kd": 0,  # __init__.py: imports on first use only
    "dino_kd.errors": 0,
    "dino_kd.files": 0,
    "dino_kd.lengths": 0,
    "dino_kd.schema": 0,
    "dino_kd.describe": 0,
    "dino_kd.problems": 0,
    "dino_kd.config": 0,
    "dino_kd.runlog": 0,
    "dino_kd.distributed": 0,
    "dino_kd.cache_entries": 0,
    "dino_kd.hardware": 0,
    "dino_kd.process": 0,
    "dino_kd.products": 0,
    "dino_kd.classifiers": 1,
    "dino_kd.coarse_search": 1,
    "dino_kd.losses": 1,
    "dino_kd.models": 1,
    "dino_kd.data": 1,
    "dino_kd.metrics": 1,
    "dino_kd.features": 2,
    "dino_kd.feature_cache": 2,
    "dino_kd.pca": 2,
    "dino_kd.visualize": 2,
    "dino_kd.terms": 2,
    "dino_kd.knn": 2,
    "dino_kd.linear": 2,
    "dino_kd.duplicates": 2,
    "dino_kd.descriptors": 2,
    "dino_kd.propagation": 2,
    "dino_kd.logistic": 2,
    "dino_kd.engine": 3,
    "dino_kd.tasks": 4,
    "dino_kd.presets": 5,
    "dino_kd.crop_sizes": 5,
    "dino_kd.pretrained": 5,
    "dino_kd.rundir": 5,
    "dino_kd.training": 6,
    "dino_kd.pretrain": 6,
    "dino_kd.distill": 6,
    "dino_kd.demo": 6,
    "dino_kd.bench": 6,
    "eval": 7,
    "launch": 7,
    "dino_kd.cli": 8,
    "dino_kd.__main__": 9,
}
SIDEWAYS = {
    # the demo is the pretraining story told with an example
    ("dino_kd.demo", "dino_kd.pretrain"),
    # what is measured is that story
    ("dino_kd.bench", "dino_kd.training"),
    ("dino_kd.pretrain", "dino_kd.training"),
    # what is kept is what was extracted
    ("dino_kd.feature_cache", "dino_kd.features"),
}
# `python -m X` ends in the same error handling as `dino-kd`: one import below `__main__`.
RUNS_AS_SCRIPT = {
    command.module for command in COMMANDS.values() if not command.module.startswith("dino_kd.")
} | {"launch.local"}


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def modules() -> dict[str, ast.Module]:
    files = [f for folder in ("dino_kd", "eval", "launch") for f in (ROOT / folder).rglob("*.py")]
    return {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: -node.level]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield below if below in modules() else base


def ours(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in ("dino_kd", "eval", "launch")}


def row(name: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in LAYERS:
            found = ".".join(parts[:length])
            assert found != "dino_kd" or name == "dino_kd", f"{name} has no layer; add it here"
            return found
    raise AssertionError(f"{name} has no layer; add it here and to docs/design.md")


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_go_down(name: str) -> None:
    if name == "dino_kd":
        return
    for target in ours(imports(name, modules()[name])):
        if (target == "dino_kd.cli" and name in RUNS_AS_SCRIPT) or target == "dino_kd":
            continue
        mine, its = row(name), row(target)
        allowed = LAYERS[its] < LAYERS[mine] or mine == its or LAYERS[mine] == LAYERS[its] == 0
        assert allowed or (name, target) in SIDEWAYS, (
            f"{name} (layer {LAYERS[mine]}) imports {target} (layer {LAYERS[its]})"
        )


def test_scripts_import_the_command_line_under_main_only() -> None:
    for name in RUNS_AS_SCRIPT & set(modules()):
        body = [node for node in modules()[name].body if not isinstance(node, ast.If)]
        assert "dino_kd.cli" not in {t for node in body for t in imports(name, node)}


def test_the_library_never_names_the_evaluators_or_the_launcher() -> None:
    for name, tree in modules().items():
        if name.startswith("dino_kd"):
            found = {t.partition(".")[0] for t in imports(name, tree)}
            assert not found & {"eval", "launch"}, name


def test_evaluators_and_launcher_do_not_know_each_other() -> None:
    for name, tree in modules().items():
        top = name.partition(".")[0]
        other = {"eval": "launch", "launch": "eval"}.get(top)
        assert other not in {t.partition(".")[0] for t in imports(name, tree)}, name


def test_there_are_no_circles() -> None:
    """Depth-first search over the imports, those inside functions included."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for target in ours(imports(name, modules()[name])) - {"dino_kd", "dino_kd.cli", name}:
            if target in modules() and not _is_own_package(name, target):
                visit(target, (*path, name))
        done.add(name)

    for name in modules():
        if name not in ("dino_kd", "dino_kd.cli"):
            visit(name, ())


def _is_own_package(name: str, target: str) -> bool:
    return name.startswith(f"{target}.")


def test_the_design_page_names_every_room() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for name in LAYERS:
        short = name.removeprefix("dino_kd.")
        assert re.search(rf"`{short}[`/(*]", page), f"docs/design.md does not name {short}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_room_is_a_drawer_for_everything(name: str) -> None:
    """Names that say nothing: utils.py, and classes that manage, help, wrap or are a base."""
    assert name.rpartition(".")[2] not in {"utils", "common", "helpers", "misc"}
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"(Manager|Helper|Wrapper)$|^_?Base[A-Z]", node.name), node.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(modules()[name]), f"{name} has no docstring"
