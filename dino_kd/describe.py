"""Settings in plain words: what a type accepts, `--help` texts and docs/config.md.

Everything here is read from the schema, so that words and checks cannot drift apart.
"""

from __future__ import annotations

import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from dino_kd.schema import InWords, Settings


class Leaf(NamedTuple):
    """One setting: its dotted path and its pydantic field."""

    path: str
    field: FieldInfo


def is_section(field: FieldInfo) -> bool:
    """True for a field that holds further settings."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Settings)


def section_schema(field: FieldInfo) -> type[Settings]:
    """The settings of a section."""
    return typing.cast(type[Settings], field.annotation)


def leaves(schema: type[Settings], prefix: str = "") -> Iterator[Leaf]:
    """Every setting below `schema`, in the order of the file."""
    for name, field in schema.model_fields.items():
        if is_section(field):
            yield from leaves(section_schema(field), f"{prefix}{name}.")
        else:
            yield Leaf(prefix + name, field)


def sections(schema: type[Settings], prefix: str = "") -> Iterator[str]:
    """The dotted path of every group of settings."""
    for name, field in schema.model_fields.items():
        if is_section(field):
            yield prefix + name
            yield from sections(section_schema(field), f"{prefix}{name}.")


def free_on_resume(field: FieldInfo) -> bool:
    """True when the setting may change between two parts of one run."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("free_on_resume"))


def accepted(field: FieldInfo) -> str:
    """What the field accepts, such as ``'auto' or a whole number > 0``."""
    return _type_in_words(field.annotation, field.metadata)


def choices(field: FieldInfo) -> list[str]:
    """The words that a field accepts by name (its Literals)."""
    return [value for value in _literals(field.annotation) if isinstance(value, str)]


def example(field: FieldInfo) -> str:
    """A value to show for a setting that has no default."""
    return str((field.examples or ["VALUE"])[0])


def kinds(annotation: Any) -> set[Any]:
    """The plain types below unions and annotations: {int, str, NoneType, ...}."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return kinds(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(kinds(part) for part in typing.get_args(annotation)))
    return {origin or annotation}


def value_in_words(value: Any) -> str:
    """A value as a person writes it in YAML: none, true, auto, [0.4, 1]."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_in_words, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {value_in_words(v)}" for k, v in value.items()) + "}"
    return str(value)


def describe_settings(
    schema: type[Settings],
    form: Literal["text", "markdown"] = "text",
    *,
    level: int = 2,
    own: bool = False,
) -> str:
    """Field, type, default, unit and meaning of every setting, for `--help` or docs/config.md.

    Of Markdown, `level` is the depth of its headings, and `own` leaves out what the schema has
    from another one. The resume column appears where the schema has a `resume` setting.
    """
    return _as_markdown(schema, level, own) if form == "markdown" else _as_text(schema)


def _as_text(schema: type[Settings]) -> str:
    resumable = "resume" in schema.model_fields
    lines: list[str] = []
    for title, doc, group in _groups(schema):
        if title:
            lines += ["", f"{title}: {doc}"]
        for path, field in group:
            unit = f" [{_unit(field)}]" if _unit(field) else ""
            resume = "; may change on resume" if resumable and free_on_resume(field) else ""
            lines.append(f"  {path}{unit}: {accepted(field)}; {_default(field)}{resume}")
            lines += textwrap.wrap(
                field.description or "", 96, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines) + "\n"


def _as_markdown(schema: type[Settings], level: int, own: bool) -> str:
    resumable = "resume" in schema.model_fields
    names = ["setting", "accepts", "default", "unit", "meaning"] + ["on resume"] * resumable
    lines: list[str] = []
    for title, doc, group in _groups(schema, own=own):
        if title:
            lines += ["", f"{'#' * level} `{title}`", "", doc, ""]
        lines += [_row(names), _row(["---"] * len(names))]
        for path, field in group:
            cells = [f"`{path}`", accepted(field), _default(field).removeprefix("default ")]
            cells += [_unit(field), field.description or ""]
            cells += ["may change" if free_on_resume(field) else "fixed"] * resumable
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _groups(
    schema: type[Settings], prefix: str = "", *, own: bool = False
) -> Iterator[tuple[str, str, list[Leaf]]]:
    """(dotted section, its one-line meaning, its settings): the top level first."""
    written_here = inspect.get_annotations(schema)
    fields = {n: f for n, f in schema.model_fields.items() if not own or n in written_here}
    leaves = [Leaf(prefix + name, field) for name, field in fields.items() if not is_section(field)]
    doc = " ".join((schema.__doc__ or "").split())
    yield prefix.rstrip("."), doc, leaves
    for name, field in fields.items():
        if is_section(field):
            yield from _groups(section_schema(field), f"{prefix}{name}.")


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("unit") or "") if isinstance(extra, dict) else ""


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"default {value_in_words(field.default)}"


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [v for part in typing.get_args(annotation) for v in _literals(part)]
    return []


def _type_in_words(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    metadata = list(_flat(metadata))
    for item in metadata:
        if isinstance(item, InWords):
            return item.accepted
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_in_words(parts[0], [*metadata, *parts[1:]])
    if origin in (Union, types.UnionType):
        return _joined([_type_in_words(part) for part in parts])
    if origin is Literal:
        return _joined([value_in_words(value) for value in parts])
    if origin is list and isinstance(parts[0], type) and issubclass(parts[0], Settings):
        member = next(iter(parts[0].model_fields))
        return f"a list of sections, such as [{{{member}: VALUE}}]"
    if origin is list:
        return f"a list of {_plural(_type_in_words(parts[0]))}"
    if origin is tuple:
        return f"a list of {len(parts)} {_plural(_type_in_words(parts[0]))}"
    if origin is dict:
        return "a mapping {name: value}"
    words = {bool: "true or false", str: "text", type(None): "none"}
    if annotation in words:
        return words[annotation]
    numbers = {int: "a whole number", float: "a number"}
    return f"{numbers[annotation]}{_bounds(metadata)}"


def _joined(words: list[str]) -> str:
    *first, last = [part for word in words for part in word.split(" or ")]
    return f"{', '.join(first)} or {last}" if first else last


def _plural(words: str) -> str:
    return words.removeprefix("a ").replace("number", "numbers", 1)


def _flat(metadata: typing.Iterable[Any]) -> Iterator[Any]:
    """Rules written as `Field(gt=0)` inside a union arrive as a FieldInfo holding the rules."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _bounds(metadata: list[Any]) -> str:
    low = next((m for m in metadata if isinstance(m, (Ge, Gt))), None)
    high = next((m for m in metadata if isinstance(m, (Le, Lt))), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f" from {value_in_words(low.ge)} to {value_in_words(high.le)}"
    words = []
    if low is not None:
        words.append(f">= {low.ge}" if isinstance(low, Ge) else f"> {low.gt}")
    if high is not None:
        words.append(f"<= {high.le}" if isinstance(high, Le) else f"< {high.lt}")
    return " " + " and ".join(words) if words else ""
