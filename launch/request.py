"""From the words of the command line to a job on paper; mistakes are found before the start."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dino_kd.config import dump_settings, load_settings
from dino_kd.errors import ConfigError, UserError, unknown_name
from dino_kd.files import write_text
from dino_kd.schema import COMMANDS, LaunchConfig, Settings, SlurmSettings

from .job import Job, Point

LAUNCHABLE = sorted(set(COMMANDS) - {"launch"})


@dataclass
class Words:
    """The command line, sorted."""

    flags: dict[str, str] = field(default_factory=dict)
    slurm: list[str] = field(default_factory=list)
    grid: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """A job, its request, and the resolved settings of its points as YAML."""

    job: Job
    slurm: SlurmSettings
    configs: list[str]

    def write_configs(self) -> None:
        """Keep them beside the job: config.yaml, or config_0.yaml and so on."""
        for number, text in enumerate(self.configs):
            write_text(self.job.path("config.yaml", number), text)


def split(argv: list[str], flags: dict[str, bool]) -> Words:
    """Sort the words; `flags` maps each accepted --flag to whether it takes a value.

    Raises ConfigError for any other flag.
    """
    words = Words()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in flags:
            takes_value = flags[name] and not equals and rest and not _is_setting(rest[0])
            words.flags[name] = rest.pop(0) if takes_value else value
        elif word.startswith("--") and name.startswith(("--slurm", "--grid")):
            raise ConfigError(f"{word}: settings are written without dashes: {word.lstrip('-')}")
        elif word.startswith("--") and word != "--help":
            raise unknown_name("option", name, flags)
        elif word.startswith("slurm."):
            words.slurm.append(word)
        elif word.startswith("grid."):
            words.grid[name.removeprefix("grid.")] = value
        else:
            words.rest.append(word)
    return words


def _is_setting(word: str) -> bool:
    return word.startswith("-") or "=" in word


def site_file() -> Path:
    """The user's defaults: $DINO_KD_SLURM, or ~/.config/dino_kd/slurm.yaml."""
    if named := os.environ.get("DINO_KD_SLURM"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "dino_kd" / "slurm.yaml"


def slurm_settings(words: list[str], under: dict[str, Any] | None = None) -> SlurmSettings:
    """The request: the user's file, then `under` (a pipeline's sections), then the command line.

    Raises ConfigError with every problem.
    """
    file = site_file()
    if os.environ.get("DINO_KD_SLURM") and not file.is_file():
        raise ConfigError(f"DINO_KD_SLURM: there is no file {file}")
    between = [f"slurm.{name}={as_word(value)}" for name, value in (under or {}).items()]
    given = [str(file)] if file.is_file() else []
    # later words win: a dict keeps the last value of each name
    last = {word.partition("=")[0]: word for word in [*between, *words]}
    return load_settings(LaunchConfig, [*given, *last.values()], command="launch").slurm


def plan_job(command: str, words: list[str], slurm: SlurmSettings, *, resume: bool = False) -> Plan:
    """One command as a job. `resume`: a run that exists already goes on, without being asked to.

    Raises ConfigError for an unknown command, wrong settings, or a run that exists.
    """
    schema = schema_of(command)
    settings = load_settings(schema, backbone_named(schema, words), command=command)
    if "run_dir" in schema.model_fields:
        settings = goes_on(settings, words, resume)
        folder = Path(getattr(settings, "run_dir"))  # noqa: B009 - not every schema has it
        job_dir = chosen_job_dir(slurm) or folder / "launch"
        point = Point(folder.name, str(folder), [str(job_dir / "config.yaml")])
    else:
        job_dir = chosen_job_dir(slurm) or beside_backbone(command, settings)
        point = Point(job_dir.parent.name, str(job_dir), words)
    job = Job(job_dir, command, [point], Path.cwd(), slurm.model_dump(mode="json"))
    return Plan(job, slurm, [dump_settings(settings)])


def plan_sweep(command: str, words: Words, slurm: SlurmSettings) -> Plan:
    """One command at several settings as an array; each point has a folder in run_dir.

    Raises ConfigError for the mistakes of every point at once.
    """
    schema = schema_of(command)
    if "run_dir" not in schema.model_fields:
        raise ConfigError(
            f"sweep: dino-kd {command} has no run_dir; to evaluate every point of a sweep write "
            "dino-kd launch eval SWEEP --after"
        )
    settings = sweep_points(words)
    base = load_settings(schema, words.rest, command=command)
    parent = Path(getattr(base, "run_dir")).expanduser().absolute()  # noqa: B009
    job_dir = chosen_job_dir(slurm) or parent / "launch"
    points, configs, problems = [], [], dict[str, None]()
    width = len(str(len(settings) - 1))
    for number, own in enumerate(settings):
        name = f"{number:0{width}d}"
        given = [*words.rest, *(f"{k}={v}" for k, v in own.items()), f"run_dir={parent / name}"]
        try:
            made = goes_on(load_settings(schema, given, command=command), given, resume=True)
        except ConfigError as error:
            problems.update(dict.fromkeys(f"point {name}: {line}" for line in error.problems))
            continue
        config = job_dir / f"config_{number}.yaml"
        points.append(Point(name, str(parent / name), [str(config)], own))
        configs.append(dump_settings(made))
    if problems:
        raise ConfigError(problems)
    record = slurm.model_dump(mode="json")
    job = Job(job_dir, command, points, Path.cwd(), record, is_array=True)
    return Plan(job, slurm, configs)


def sweep_points(words: Words) -> list[dict[str, str]]:
    """The settings of each point, as text: the product of all ``grid.a.b=[1, 2]``, or a list.

    ``--points FILE`` is a YAML list of mappings. Raises ConfigError.
    """
    if file := words.flags.get("--points"):
        if words.grid:
            raise ConfigError("--points and grid. cannot stand together; put all points in one")
        return _points_of(Path(file).expanduser())
    if not words.grid:
        raise ConfigError(
            "sweep: nothing varies; write grid.SETTING=[VALUE, VALUE], such as "
            "'grid.optim.base_lr=[1e-4, 5e-4]', or --points FILE"
        )
    columns = []
    for name, text in words.grid.items():
        try:
            values = yaml.load(text, Loader=yaml.BaseLoader)  # text stays text: 1e-4, 010
        except yaml.YAMLError:
            values = None
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{name}: expected a list such as [1, 2], got {text!r}")
        columns.append([(name, as_word(value)) for value in values])
    return [dict(point) for point in itertools.product(*columns)]


def _points_of(file: Path) -> list[dict[str, str]]:
    try:
        points = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--points: cannot read {file} ({error})") from None
    if not isinstance(points, list) or not all(isinstance(p, dict) and p for p in points):
        raise ConfigError(
            f"--points: {file} should be a list such as '- {{optim.base_lr: 1e-4, seed: 1}}'"
        )
    return [{str(name): as_word(value) for name, value in point.items()} for point in points]


def schema_of(command: str) -> type[Settings]:
    """The settings of a command. Raises ConfigError when there is no such command."""
    if command not in LAUNCHABLE:
        raise unknown_name("command", command, LAUNCHABLE)
    return COMMANDS[command]


def goes_on(settings: Settings, words: list[str], resume: bool) -> Settings:
    """The settings of a job's run: run_dir absolute, and every life after the first resumes.

    Raises ConfigError when run_dir holds a run and nobody said that it is to go on.
    """
    run_dir = Path(getattr(settings, "run_dir")).expanduser().absolute()  # noqa: B009
    asked = any(word.startswith("resume=") for word in words)
    if (run_dir / "config.yaml").is_file() and not (resume or asked):
        raise ConfigError(
            f"run_dir: {run_dir} already holds a run; add resume=auto to continue it, or choose "
            "another run_dir"
        )
    return settings.model_copy(update={"run_dir": str(run_dir), "resume": "auto"})


def chosen_job_dir(slurm: SlurmSettings) -> Path | None:
    """slurm.job_dir as an absolute path."""
    return Path(slurm.job_dir).expanduser().absolute() if slurm.job_dir else None


def beside_backbone(command: str, settings: Settings) -> Path:
    """Where an evaluator's job lives: in the run that it scores.

    Raises ConfigError when the backbone is no run directory.
    """
    backbone = str(getattr(settings, "backbone", ""))
    path = Path(backbone).expanduser()
    is_name = ":" in backbone or backbone == "pixels" or path.is_file() or not backbone
    if is_name:
        raise ConfigError(
            f"slurm.job_dir: where should the files of this job go? backbone={backbone} is no run "
            "directory, so name a folder: slurm.job_dir=runs/scores"
        )
    return path.absolute() / f"launch_{command}"


def backbone_named(schema: type[Settings], words: list[str]) -> list[str]:
    """For a check before the start: a bare RUN becomes backbone=RUN, with its monitor's sets.

    The command itself does the same when it runs; the run may not exist yet.
    """
    if "backbone" not in schema.model_fields:
        return words
    for word in words:
        if (config := _run_config(word)) is not None:
            return with_monitor_sets(config, word, [w for w in words if w != word])
    return words


def with_monitor_sets(config: Path, run: str, words: list[str]) -> list[str]:
    """``backbone=RUN`` and the sets of its monitor, as far as `words` name no others."""
    try:
        monitor = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("monitor") or {}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{config} cannot be read ({error})") from None
    sets = [
        f"{name}={monitor[name]}"
        for name in ("train", "test")
        if monitor.get(name) and not any(word.startswith(f"{name}=") for word in words)
    ]
    return [f"backbone={run}", *words, *sets]


def _run_config(word: str) -> Path | None:
    """The settings of the run that a bare word names, also of one that is only launched."""
    if "=" in word or word.startswith("-"):
        return None
    candidates = (Path(word) / "config.yaml", Path(word) / "launch" / "config.yaml")
    return next((path for path in candidates if path.is_file()), None)


def as_word(value: Any) -> str:
    """A value as it stands after the = of the command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
