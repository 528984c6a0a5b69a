"""From a YAML file, a packaged name or a run directory plus `a.b=c` to checked settings.

Every problem is reported at once: dotted path, value found, what is accepted, near names.
``python -m dino_kd.config > docs/config.md`` writes the page of all settings.
"""

from __future__ import annotations

import copy
import re
import sys
import textwrap
import typing
from collections.abc import Hashable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from dino_kd.describe import (
    accepted,
    describe_settings,
    example,
    free_on_resume,
    kinds,
    leaves,
    sections,
    value_in_words,
)
from dino_kd.errors import ConfigError, did_you_mean, unknown_name
from dino_kd.problems import near_settings, validate
from dino_kd.schema import COMMANDS, CROP_PRESETS, Settings

__all__ = [
    "Change",
    "HelpRequested",
    "changed_settings",
    "command_help",
    "describe_settings",
    "dump_settings",
    "find_config",
    "load_settings",
    "packaged_configs",
]

AnySettings = TypeVar("AnySettings", bound=Settings)


class HelpRequested(Exception):  # noqa: N818 - not an error
    """Raised for `--help`; the message is the text to print."""


class Change(NamedTuple):
    """A setting that differs between two configurations; `free` ones may differ on resume."""

    path: str
    old: Any
    new: Any
    free: bool

    def __str__(self) -> str:
        return f"{self.path}: {value_in_words(self.old)} -> {value_in_words(self.new)}"


def load_settings(schema: type[AnySettings], argv: list[str], *, command: str) -> AnySettings:
    """Read ``[CONFIG] a.b=c ...`` into `schema`; later values win.

    Raises ConfigError with every problem found, and HelpRequested for `--help`.
    """
    if {"-h", "--help"} & set(argv):
        raise HelpRequested(command_help(command, schema))
    words = _split(schema, argv, command)
    base, origin = _read_base(schema, words, command)
    overrides = _read_overrides(schema, words)
    tree = _merge(_switch_preset(base or {}, overrides), overrides)
    settings, problems = validate(
        schema, tree, command=command, overridden=set(overrides), origin=origin,
        complete=base is not None,
    )  # fmt: skip
    if words.problems or problems or settings is None:
        raise ConfigError(words.problems + problems)
    return settings


def find_config(name: str) -> Path:
    """The YAML file for a path, a run directory, or a packaged name (`pretrain/demo`).

    Raises ConfigError with near names when there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    for folder in _config_folders():
        packaged = folder / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
        if packaged.is_file():
            return packaged
    if path.is_dir():
        raise ConfigError(f"CONFIG: the folder {name!r} holds no config.yaml, so it is not a run")
    names = packaged_configs()
    same_end = [n for n in names if n.rpartition("/")[2] == name]
    if same_end:
        raise ConfigError(
            f"CONFIG: unknown config {name!r}; did you mean {' or '.join(map(repr, same_end))}?"
        )
    if did_you_mean(name, names):
        raise unknown_name("config", name, names, where="CONFIG")
    raise ConfigError(
        f"CONFIG: unknown config {name!r}: no file, no run directory and no packaged configuration "
        "has that name; 'dino-kd COMMAND --help' lists the packaged ones"
    )


def command_of(run_dir: str | Path) -> str:
    """The command that a run directory is of, such as ``pretrain``; "" for anything else."""
    file = Path(run_dir).expanduser() / "config.yaml"
    tree, _ = _read_file(file, _Words())
    return _command_with({str(key) for key in tree}) if tree else ""


def packaged_configs() -> list[str]:
    """The names that `find_config` knows, such as `pretrain/vits16_imagenet`."""
    for folder in _config_folders():
        if folder.is_dir():
            files = folder.glob("*/*.yaml")
            return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)
    return []


def dump_settings(settings: Settings) -> str:
    """YAML that `load_settings` reads back into an equal object."""
    tree = settings.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def changed_settings(old: Settings, new: Settings) -> list[Change]:
    """The settings that differ, in the order of the schema. Both have the same schema."""
    return [
        Change(path, before, after, free_on_resume(field))
        for path, field in leaves(type(new))
        if (before := value_at(old, path)) != (after := value_at(new, path))
    ]


def value_at(settings: Settings, path: str) -> Any:
    """The value under a dotted path."""
    return reduce(getattr, path.split("."), settings)


def command_help(command: str, schema: type[Settings]) -> str:
    """The text of ``dino-kd COMMAND --help``."""
    needed = " ".join(f"{p}={example(field)}" for p, field in leaves(schema) if field.is_required())
    same = {"evaluate": "suite", "bench": "pretrain"}.get(command, command)
    fitting = ", ".join(n for n in packaged_configs() if same in n.split("/"))
    listed = textwrap.fill(fitting, 90, initial_indent="  ", subsequent_indent="  ")
    config = f"{fitting.split(', ')[0]} " if fitting else ""
    return (
        f"usage: dino-kd {command} [CONFIG] [a.b=c ...]\n\n"
        f"{' '.join((schema.__doc__ or '').split())}\n\n"
        f"example: dino-kd {command} {config}{needed}".rstrip()
        + "\n\n"
        + (
            f"CONFIG is a YAML file, a run directory, or one of\n{listed}\n"
            if listed
            else "CONFIG is a YAML file.\n"
        )
        + "Settings given as a.b=c come after CONFIG and win over it; a.b= means none.\n\n"
        f"{describe_settings(schema)}"
    )


# Where the packaged YAML files are.


def _config_folders() -> list[Path]:
    # Two places, and no importlib.resources: that fails in a bare checkout and in some editable
    # installs, where `dino_kd.configs` is not a folder inside dino_kd.
    package = Path(__file__).resolve().parent
    return [package / "configs", package.parent / "configs"]  # wheel, checkout


# The command line.


class _Words:
    """The arguments, sorted: at most one config, the overrides, and what was wrong."""

    def __init__(self) -> None:
        self.config: str | None = None
        self.overrides: dict[str, str] = {}
        self.problems: list[str] = []


def _split(schema: type[Settings], argv: list[str], command: str) -> _Words:
    words = _Words()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        path, equals, value = word.partition("=")
        if word.startswith("-"):
            if not equals and rest and not rest[0].startswith("-") and "=" not in rest[0]:
                value = rest.pop(0)  # the 3 of `--epochs 3`
            words.problems.append(_flag_problem(schema, path, value, command))
        elif equals and "/" not in path and not _is_file(word):
            if not path or path != path.strip():
                words.problems.append(f"{word!r}: a setting is written a.b=c, without spaces")
            else:
                words.overrides[path] = value
        elif words.config is None and word not in dict(leaves(schema)):
            words.config = word
        else:
            words.problems.append(_stray_problem(schema, word, words.config))
    return words


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # longer than a file name may be, or with a null byte
        return False


def _flag_problem(schema: type[Settings], flag: str, value: str, command: str) -> str:
    name = flag.lstrip("-").replace("-", "_")
    fields = dict(leaves(schema))
    near = [name] if name in fields else near_settings(schema, name)
    near = [path for path in near if path in fields]
    if not near:
        written = "a.b=c"
    elif value:
        written = f"{near[0]}={value}{'ep' if name.endswith('epochs') and value.isdigit() else ''}"
    else:
        written = f"{near[0]}={'true' if bool in kinds(fields[near[0]].annotation) else 'VALUE'}"
    return (
        f"{flag} {value}".rstrip() + f": settings are written without dashes: {written} "
        f"(all of them: dino-kd {command} --help)"
    )


def _stray_problem(schema: type[Settings], word: str, config: str | None) -> str:
    if word in dict(leaves(schema)):
        return f"{word!r}: a setting needs a value: {word}=VALUE"
    return f"{word!r}: only one CONFIG is accepted, and {config!r} stands before it"


def _read_overrides(schema: type[Settings], words: _Words) -> dict[str, Any]:
    """The overrides by dotted path, typed as YAML types them; text settings keep their text."""
    fields, groups = dict(leaves(schema)), set(sections(schema))
    values: dict[str, Any] = {}
    for path, text in words.overrides.items():
        field = fields.get(path)
        if path in groups and not text.lstrip().startswith("{"):
            members = [name for name in fields if name.startswith(f"{path}.")]
            words.problems.append(
                f"{path}: is a section, got {text!r}; set its members, such as {members[0]}=VALUE"
            )
            continue
        if field is not None and kinds(field.annotation) <= {str, type(None)}:
            # YAML would make numbers, lists or nothing out of 2024, {000..127}.tar or #1
            values[path] = None if text in ("", "~", "null") else text
            continue
        try:
            values[path] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            expected = f"expected {accepted(field)}, " if field is not None else ""
            words.problems.append(f"{path}: {expected}got {text!r} ({_yaml_reason(error)})")
    return values


# The base: CONFIG, or the config.yaml of the run that is resumed.


def _read_base(
    schema: type[Settings], words: _Words, command: str
) -> tuple[dict[str, Any] | None, str]:
    """(the tree, what to call its file), or (None, "") when CONFIG cannot be read."""
    run_dir = words.overrides.get("run_dir")
    resume = words.overrides.get("resume", "false").lower()
    if words.config is None and run_dir and resume in ("true", "yes", "on", "auto"):
        file = Path(run_dir).expanduser() / "config.yaml"
        if file.is_file():
            tree, origin = _read_file(file, words)
            other = _other_command(schema, tree or {})
            if not other:
                return tree, origin
            words.problems.append(
                f"run_dir: {run_dir!r} holds a run of dino-kd {other}, not of dino-kd {command}; "
                "choose another run_dir"
            )
            return None, origin
        if resume != "auto":
            words.problems.append(
                f"run_dir: there is no run to resume in {run_dir!r} (it has no config.yaml); "
                "leave out resume=true to start one"
            )
            return None, ""
    if words.config is None:
        return {}, ""
    try:
        file = find_config(words.config)
    except ConfigError as error:
        near = [] if "/" in words.config else near_settings(schema, words.config)
        hint = f" (a setting is written {near[0]}=VALUE)" if near else ""
        words.problems += [problem + hint for problem in error.problems]
        return None, ""
    tree, origin = _read_file(file, words)
    if tree is None:
        return None, origin
    other = _other_command(schema, tree)
    if other:
        words.problems.append(_wrong_command(words.config, command, other))
        return None, origin
    if Path(words.config).expanduser().is_dir() and "run_dir" in schema.model_fields:
        # a run that was moved, or is named from another folder, is where it is, not where it was
        tree["run_dir"] = words.config
    return tree, origin


def _read_file(file: Path, words: _Words) -> tuple[dict[str, Any] | None, str]:
    name = str(file)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        words.problems.append(f"{_yaml_place(name, error)}: {_yaml_reason(error)}")
        return None, name
    except UnicodeDecodeError:
        words.problems.append(f"{name}: not a YAML text file (not UTF-8)")
        return None, name
    except OSError as error:
        words.problems.append(f"{name}: cannot read it: {error.strerror}")
        return None, name
    if tree is None:
        return {}, name
    if not isinstance(tree, dict):
        words.problems.append(
            f"{name}: expected lines such as 'seed: 0', got {value_in_words(tree)[:60]!r}"
        )
        return None, name
    return tree, name


def _other_command(schema: type[Settings], tree: dict[str, Any]) -> str:
    """The command whose settings these are, when they cannot be `schema`'s."""
    keys = {str(key) for key in tree}
    if len(keys - set(schema.model_fields)) < 2:  # one foreign key is rather a slip
        return ""
    return _command_with(keys)


def _command_with(keys: set[str]) -> str:
    """The first command that has all of these settings and sections, "" when none has."""
    return next((name for name, schema in COMMANDS.items() if keys <= set(schema.model_fields)), "")


def _wrong_command(config: str, command: str, other: str) -> str:
    sentence = f"CONFIG: {config!r} holds settings of dino-kd {other}, not of dino-kd {command}"
    if Path(config).expanduser().is_dir() and "backbone" in COMMANDS[command].model_fields:
        sentence += f"; for the backbone of that run write backbone={config}"
    return sentence


def _switch_preset(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Drop what the old and the new crop preset fill in, when the command line names a preset.

    The stored config.yaml of a run holds every value; without this, `crops.preset=small` on top
    of it would be accepted and change nothing.
    """
    new, crops = overrides.get("crops.preset"), base.get("crops")
    if not isinstance(new, str) or not isinstance(crops, dict):
        return base
    filled = {*CROP_PRESETS.get(new, {}), *CROP_PRESETS.get(str(crops.get("preset")), {})}
    return {**base, "crops": {key: crops[key] for key in crops if key not in filled}}


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(base)
    for path, value in overrides.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if isinstance(value, dict) and isinstance(node.get(last), dict):
            value = {**node[last], **value}
        node[last] = value
    return tree


# YAML, with the traps of version 1.1 taken out: 1e-4 is a number, 010 is ten, 1:30 and 2024-01-01
# are text, and a key given twice is an error.


def _plain_scalars() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """(tag, pattern) of unquoted text by first character, in PyYAML's own form."""
    number = "-+.0123456789"
    table = [
        ("merge", r"<<", "<"),
        ("null", r"~|null|Null|NULL|", "~nN"),
        ("bool", r"[tT]rue|TRUE|[fF]alse|FALSE|[yY]es|[nN]o|[oO]n|[oO]ff", "tTfFyYnNoO"),
        ("int", r"[-+]?(0|[1-9][0-9_]*)", number),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", number),
        ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", number),
    ]
    scalars: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in table:
        for character in [*first, *([""] if tag == "null" else [])]:
            entry = (f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})\\Z"))
            scalars.setdefault(character, []).append(entry)
    return scalars


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    yaml_implicit_resolvers = _plain_scalars()

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would not read back as text; lists on one line."""

    yaml_implicit_resolvers = _plain_scalars()
    yaml_representers: typing.ClassVar = {
        **yaml.SafeDumper.yaml_representers,
        list: lambda dumper, items: dumper.represent_sequence(
            "tag:yaml.org,2002:seq", items, flow_style=True
        ),
    }


def _yaml_reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return str(reason)


def _yaml_place(file: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file


def settings_page() -> str:
    """The text of docs/config.md."""
    parts = [
        "# Settings\n\n"
        "Generated from `dino_kd/schema/` by `make docs`; edit the schema, not this page.\n\n"
        "Every command takes `[CONFIG] a.b=c ...`: a YAML file, a run directory or a packaged\n"
        "name, and settings that win over it. `a.b=` means none. Sections of a YAML file are the\n"
        "parts of the dotted names.\n"
    ]
    for command, schema in COMMANDS.items():
        doc = " ".join((schema.__doc__ or "").split())
        base = next((n for n, s in COMMANDS.items() if s in schema.__mro__[1:]), None)
        table = describe_settings(schema, "markdown", level=3, own=base is not None)
        same = f"The settings of [{base}](#{base}), and these.\n\n" if base else ""
        parts.append(f"\n## {command}\n\n{doc}\n\n{same}{table}")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(settings_page())
