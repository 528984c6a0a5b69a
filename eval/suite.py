"""Run the standard evaluators on one backbone, from one file, into one table.

    dino-kd evaluate runs/x train=/images/train test=/images/test
    dino-kd evaluate eval/suite backbone=runs/x train=... test=... 'compare=[untrained, pixels]'
    torchrun --nproc_per_node=4 -m eval.suite runs/x train=... test=...

Each evaluator writes its own JSON; features are extracted once for all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dino_kd.config import command_of, load_settings
from dino_kd.distributed import broadcast, is_main_process, process_group
from dino_kd.errors import ConfigError, UserError, unknown_name
from dino_kd.files import write_json
from dino_kd.problems import validate
from dino_kd.schema import (
    COMMANDS,
    BackboneSettings,
    EvaluateConfig,
    FeatureSettings,
    PretrainConfig,
    Settings,
)

from .results import Stopwatch, make_result
from .subject import PIXELS, open_images

# What may stand in a suite: eval.NAME has `score(settings, device)` and `headline(result)`.
EVALUATORS = ("knn", "linear", "logreg", "fewshot", "quality", "retrieval", "copydetect", "video")
OF_PIXELS = ("knn", "linear", "logreg", "fewshot")  # the others need a network
_BRANCHES = ("teacher", "student", "untrained")
_OWN = {"suite", "compare", "output"}  # of the suite itself; everything else is handed on


@dataclass
class Column:
    """One network in the table: the settings of each of its evaluators, and what came out."""

    title: str
    settings: dict[str, BackboneSettings] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    """`dino-kd evaluate [RUN] [CONFIG] a.b=c ...`; returns the exit code."""
    settings = load_settings(EvaluateConfig, name_the_run(argv), command="evaluate")
    with process_group(settings.device) as device:
        columns = evaluate(settings, device)
        failed = broadcast(any(column.errors for column in columns))
    return UserError.exit_code if failed else 0


def name_the_run(argv: list[str]) -> list[str]:
    """Turn the bare word RUN into ``backbone=RUN``, with the sets that its monitor used, if any.

    What the command line names itself wins. Raises ConfigError for a damaged pretraining run.
    """
    words = list(argv)
    for word in argv:
        if "=" in word or word.startswith("-") or not (Path(word) / "config.yaml").is_file():
            continue
        words.remove(word)
        words.append(f"backbone={word}")
        if command_of(word) not in ("pretrain", ""):
            continue  # a run of `dino-kd distill` or `finetune` has no monitor
        monitor = load_settings(PretrainConfig, [word], command="pretrain").monitor
        for name in ("train", "test"):
            spec = getattr(monitor, name)
            if spec is not None and not any(w.startswith(f"{name}=") for w in argv):
                words.append(f"{name}={spec}")
    return words


def evaluate(settings: EvaluateConfig, device: torch.device) -> list[Column]:
    """Run every evaluator on every network; all processes call this, the main one reports.

    What one evaluator cannot do on one network is kept as an error, and the rest goes on.

    Raises:
        ConfigError: wrong settings of any evaluator, before the first one starts.
    """
    watch = Stopwatch()
    folder = result_folder(settings)
    with shared_cache(settings.cache) as cache:
        columns = plan(settings, cache, folder)
        check_data(columns)
        for column in columns:
            for name, own in column.settings.items():
                score(column, name, own, device, watch)
            if column is columns[0] and not column.results:
                break  # the network itself cannot be scored: nothing to compare with
    if is_main_process():
        print(table(columns))
        for column in columns:
            for problem, names in by_problem(column.errors).items():
                print(f"error: {column.title}, {', '.join(names)}: {problem}", file=sys.stderr)
        if folder is not None:
            write_json(
                folder / f"suite_{settings.branch}.json", summary(columns, settings, watch, device)
            )
            print(f"every result as JSON: {folder}")
    return columns


def check_data(columns: list[Column]) -> None:
    """Open every data set, so that a mistake in one is told once and at once. Raises UserError.

    In three channels, whatever the network takes: no image is read.
    """
    sets = {
        (name, spec): settings
        for column in columns
        for settings in column.settings.values()
        if isinstance(settings, FeatureSettings)
        for name in ("train", "test")
        if (spec := getattr(settings, name, ""))
    }
    for (name, _), settings in sets.items():
        open_images(settings, name, 3)


def score(
    column: Column, name: str, settings: BackboneSettings, device: torch.device, watch: Stopwatch
) -> None:
    """One evaluator on one network; its own table stays silent, its mistakes are kept."""
    step = f"{column.title}, {name}"
    module = importlib.import_module(f".{name}", __package__)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            column.results[name] = module.score(settings, device)
    except UserError as error:
        column.errors[name] = str(error)
    broadcast(None)  # most evaluators end on the main process alone
    watch.lap(step)
    if is_main_process():
        outcome = "failed" if name in column.errors else "done"
        print(f"{step}: {outcome} in {watch.seconds[step]:.1f} s", flush=True)


def by_problem(errors: dict[str, str]) -> dict[str, list[str]]:
    """The evaluators that failed, together where they failed of the same."""
    found: dict[str, list[str]] = {}
    for name, problem in errors.items():
        found.setdefault(problem, []).append(name)
    return found


def plan(settings: EvaluateConfig, cache: str, folder: Path | None) -> list[Column]:
    """The networks in the order of the table, with checked settings for each evaluator.

    Raises ConfigError that lists every problem.
    """
    unknown = [name for name in settings.suite if name not in EVALUATORS]
    if unknown:
        raise ConfigError(
            [str(unknown_name("evaluator", name, EVALUATORS, where="suite")) for name in unknown]
        )
    shared = settings.model_dump(mode="json", exclude=_OWN) | {"cache": cache}
    columns: list[Column] = []
    problems: list[str] = []
    for title, network in networks(settings).items():
        column = Column(title)
        stem = title if network else settings.branch
        for name, own in settings.suite.items():
            if network.get("backbone") == PIXELS and name not in OF_PIXELS:
                continue
            schema = COMMANDS[name]
            given = handed_on(schema, shared) | network
            # a branch of a run directory has a place there already, and so has its linear head
            if folder is not None and (settings.output is not None or "backbone" in network):
                given["output"] = str(folder / f"{name}_{file_name(stem)}.json")
            made, wrong = validate(
                schema, given | own, command=name, overridden=set(own), origin=""
            )
            problems += [f"suite.{name}.{problem}" for problem in wrong]
            if isinstance(made, BackboneSettings):
                column.settings[name] = made
        columns.append(column)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return columns


def handed_on(schema: type[Settings], shared: dict[str, Any]) -> dict[str, Any]:
    """What an evaluator takes from the suite's own settings.

    The benchmark sets have a size and a batch of their own, and name their data themselves.
    """
    if not issubclass(schema, FeatureSettings):
        shared = {k: v for k, v in shared.items() if k not in ("image_size", "batch_size")}
    # what needs no labels looks at the training images, whose features the others need anyway
    shared = shared | {"data": shared["train"]}
    return {key: value for key, value in shared.items() if key in schema.model_fields}


def networks(settings: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Title of every column, and the settings in which it differs from the first one.

    Raises ConfigError for a branch of something that has none.
    """
    is_run = (Path(settings.backbone).expanduser() / "config.yaml").is_file()
    compare = settings.compare
    if compare == "auto":
        is_pretraining = is_run and command_of(settings.backbone) == "pretrain"
        compare = ["untrained"] if is_pretraining else []  # other runs keep one network
    first = settings.branch if is_run else settings.backbone
    found: dict[str, dict[str, Any]] = {first: {}}
    for other in compare:
        if other in _BRANCHES and not is_run:
            raise ConfigError(
                f"compare: {other!r} is a branch of a run directory, and backbone="
                f"{settings.backbone} is none; name another backbone, or pixels"
            )
        change = (
            {"branch": other} if other in _BRANCHES else {"backbone": other, "branch": "teacher"}
        )
        found.setdefault(other, change)
    return found


def result_folder(settings: EvaluateConfig) -> Path | None:
    """Where the JSON files go, None for nowhere. Raises ConfigError for a file."""
    if settings.output is not None:
        folder = Path(settings.output).expanduser()
        if folder.is_file():
            raise ConfigError(f"output: {folder} is a file; give a folder for several results")
        return folder
    run_dir = Path(settings.backbone).expanduser()
    return run_dir / "eval" if (run_dir / "config.yaml").is_file() else None


def file_name(title: str) -> str:
    """A title without what file systems dislike, such as timm-vit_small of timm:vit_small."""
    return re.sub(r"[^\w.-]+", "-", title)


@contextlib.contextmanager
def shared_cache(cache: str) -> Iterator[str]:
    """The cache that the evaluators share; for ``off`` a folder that goes away with the suite."""
    if cache != "off":
        yield cache
        return
    with contextlib.ExitStack() as stack:
        made = ""
        if is_main_process():
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="dino_kd-features-"))
        yield broadcast(made)


def headline(name: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    """The (title, number) pairs that an evaluator wants to be seen first."""
    module = importlib.import_module(f".{name}", __package__)
    return module.headline(result)  # type: ignore[no-any-return]


def table(columns: list[Column]) -> str:
    """One row for each headline number, one column for each network."""
    rows: dict[str, dict[str, str]] = {}
    for column in columns:
        for name, result in column.results.items():
            for title, number in headline(name, result):
                rows.setdefault(title, {})[column.title] = number
        for name in column.errors:
            rows.setdefault(name, {})[column.title] = "error"
    width = max(map(len, rows), default=0)
    widths = [max(len(column.title), 14) for column in columns]
    lines = [
        "",
        " " * width + "".join(f"  {c.title:>{w}}" for c, w in zip(columns, widths, strict=True)),
    ]
    for title, numbers in rows.items():
        cells = (numbers.get(column.title, "-") for column in columns)
        lines.append(
            f"{title:<{width}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    notes = [f"{name}: {note}" for name, r in columns[0].results.items() for note in r["notes"]]
    return "\n".join([*lines, "", *(f"note: {note}" for note in dict.fromkeys(notes))])


def summary(
    columns: list[Column], settings: EvaluateConfig, watch: Stopwatch, device: torch.device
) -> dict[str, Any]:
    """All numbers in one JSON, in the form of a single evaluator's result."""
    first = next((r for column in columns for r in column.results.values()), None)
    described = first or {"protocol": {}, "backbone": {"source": settings.backbone}, "data": {}}
    return make_result(
        "suite",
        settings,
        metrics={
            column.title: {name: result["metrics"] for name, result in column.results.items()}
            for column in columns
        },
        protocol={
            column.title: {name: result["protocol"] for name, result in column.results.items()}
            for column in columns
        },
        backbone=described["backbone"],
        data=described["data"],
        device=device,
        seconds=watch.seconds,
        notes=[f"{c.title}, {name}: {text}" for c in columns for name, text in c.errors.items()],
    )


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
