"""What is wrong with a tree of settings: one sentence for each setting, all of them at once.

A sentence names the dotted path, the value found, what is accepted, and near names.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dino_kd.describe import (
    accepted,
    choices,
    example,
    is_section,
    kinds,
    leaves,
    section_schema,
    sections,
    value_in_words,
)
from dino_kd.errors import did_you_mean
from dino_kd.schema import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)

# What other programs call a setting; used only for "did you mean".
FOREIGN_NAMES = {
    "arch": "model.backbone",
    "bs": "optim.batch_size",
    "checkpoint": "backbone",
    "data_dir": "data.train",
    "data_path": "data.train",
    "epochs": "optim.length",
    "learning_rate": "optim.base_lr",
    "lr": "optim.base_lr",
    "norm_last_layer": "head.unit_prototypes",
    "out_dim": "head.num_prototypes",
    "output_dir": "run_dir",
    "pretrained_weights": "backbone",
    "steps": "optim.length",
    "wd": "optim.weight_decay",
    "workers": "data.num_workers",
}


def validate(
    schema: type[AnySettings],
    tree: dict[str, Any],
    *,
    command: str,
    overridden: set[str],
    origin: str,
    complete: bool = True,
) -> tuple[AnySettings | None, list[str]]:
    """(settings, problems); the settings are None when there are problems.

    `overridden` paths came from the command line, all others from the file `origin`. Nothing is
    reported as missing from a tree that is not `complete`.
    """
    check = _Check(schema, overridden, origin)
    clean = check.section(schema, tree, "")
    settings = None
    try:
        settings = schema.model_validate(clean)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            check.pydantic_problem(found, clean, command, complete)
    problems = list(check.problems.values())
    return (None if problems else settings), problems


def near_settings(schema: type[Settings], path: str) -> list[str]:
    """At most three settings or sections that `path` may have meant, nearest first."""
    paths = [leaf.path for leaf in leaves(schema)]
    names = [*paths, *sections(schema)]
    last = path.rpartition(".")[2]
    by_leaf: dict[str, list[str]] = {}
    for name in names:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    near = [FOREIGN_NAMES[last]] if FOREIGN_NAMES.get(last) in paths else []
    near += by_leaf.get(last, [])
    near += difflib.get_close_matches(path, names, n=3, cutoff=0.75)
    for leaf in difflib.get_close_matches(last, by_leaf, n=3, cutoff=0.7):
        near += by_leaf[leaf]
    return list(dict.fromkeys(near))[:3]


class _Check:
    """Collects one problem for each dotted path."""

    def __init__(self, schema: type[Settings], overridden: set[str], origin: str) -> None:
        self.schema = schema
        self.overridden = overridden
        self.origin = origin
        self.problems: dict[str, str] = {}
        self.meant: set[str] = set()  # what misspelt names suggest: given, in a way

    def section(self, schema: type[Settings], tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        """The tree without what is wrong; sections that are absent or empty become {}."""
        clean: dict[str, Any] = {}
        for key, value in tree.items():
            path, field = f"{prefix}{key}", schema.model_fields.get(str(key))
            if field is None:
                self._unknown(path, value)
            elif not is_section(field):
                self._setting(path, field, value, clean, str(key))
            elif value is not None and not isinstance(value, dict):
                member = next(iter(section_schema(field).model_fields))
                self._say(
                    path,
                    f"is a section, got {_written(value)}{self._where(path)}; "
                    f"set its members, such as {path}.{member}=...",
                )
        for name, field in schema.model_fields.items():
            if is_section(field):
                below = tree.get(name)
                below = below if isinstance(below, dict) else {}
                clean[name] = self.section(section_schema(field), below, f"{prefix}{name}.")
        return clean

    def pydantic_problem(
        self, found: typing.Any, clean: dict[str, Any], command: str, complete: bool
    ) -> None:
        """One problem for each setting, however many members of a union were tried."""
        path, field, value = _locate(self.schema, found["loc"], clean)
        reason = str(found.get("ctx", {}).get("error", found["msg"]))
        if field is None:  # a rule that spans several settings of a section
            self._say(path, reason)
        elif found["type"] == "missing":
            if complete and path not in self.meant:
                hint = f"dino-kd {command} {path}={example(field)}"
                self._say(path, f"required, and not given; for example {hint}")
        elif found["type"] == "value_error":
            self._say(path, f"{reason}{self._where(path)}")
        else:
            self._wrong(path, field, value)

    def _setting(
        self, path: str, field: FieldInfo, value: Any, clean: dict[str, Any], name: str
    ) -> None:
        takes = kinds(field.annotation)
        if isinstance(value, str) and value.lower() == "none" and type(None) in takes:
            value = None  # the pages say "none"; YAML itself writes null
        if _holds_bool(value) and not takes & {bool, dict}:  # pydantic would read true as 1
            self._wrong(path, field, value)
        else:
            clean[name] = value

    def _unknown(self, path: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                self._unknown(f"{path}.{key}", below)
            return
        near = near_settings(self.schema, path)
        self.meant.update(near[:1])
        if near:
            ending = f"; did you mean {' or '.join(map(repr, near))}?"
        else:
            ending = self._members(path.split("."))
        self._say(path, f"unknown setting, got {_written(value)}{self._where(path)}{ending}")

    def _members(self, names: list[str]) -> str:
        """The settings of the deepest section on the way to an unknown name."""
        schema, known = self.schema, []
        for name in names:
            field = schema.model_fields.get(name)
            if field is None or not is_section(field):
                break
            schema = section_schema(field)
            known.append(name)
        return f"; {'.'.join(known) or 'the top level'} has: {', '.join(schema.model_fields)}"

    def _wrong(self, path: str, field: FieldInfo, value: Any) -> None:
        near = did_you_mean(value, choices(field)) if isinstance(value, str) else ""
        where = self._where(path)
        self._say(path, f"expected {accepted(field)}, got {_written(value)}{where}{near}")

    def _where(self, path: str) -> str:
        parts = path.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        return f" in {self.origin}" if self.origin and not above & self.overridden else ""

    def _say(self, path: str, problem: str) -> None:
        self.problems.setdefault(path, f"{path}: {problem}" if path else problem)


def _locate(
    schema: type[Settings], loc: tuple[int | str, ...], clean: dict[str, Any]
) -> tuple[str, FieldInfo | None, Any]:
    """(dotted path, its field, its value) of a pydantic location, cut off at the setting."""
    names: list[str] = []
    value: Any = clean
    for part in loc:
        field = schema.model_fields[str(part)]
        names.append(str(part))
        value = value.get(part) if isinstance(value, dict) else None
        if not is_section(field):
            return ".".join(names), field, value
        schema = section_schema(field)
    return ".".join(names), None, value


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, str) else value_in_words(value)


def _holds_bool(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_bool(item) for item in value)
    return isinstance(value, bool)
