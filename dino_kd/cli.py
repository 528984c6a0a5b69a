"""`dino-kd COMMAND ...`: finds the command, and turns errors into sentences and exit codes.

Commands are named by string and imported when asked for: `--help` never imports torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dino_kd import __version__
from dino_kd.errors import ConfigError, Interrupted, UserError, unknown_name
from dino_kd.process import prepare_process

EXIT_KEYBOARD = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away
# Seconds by which the main process under torchrun is ahead in telling an error. Most are the same
# in all processes: torchrun then ends the others before they repeat it.
HEAD_START = 3.0

MainFunction = Callable[[list[str]], "int | None"]


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("dino_kd.demo", "pretrain on generated images and show what was learned"),
    "pretrain": Command("dino_kd.pretrain", "learn a backbone from a folder of images"),
    "bench": Command("dino_kd.bench", "measure how fast a pretraining runs here, and why"),
    "distill": Command("dino_kd.distill.command", "teach a small network what a backbone knows"),
    "evaluate": Command("eval.suite", "all standard scores of a backbone in one table"),
    "knn": Command("eval.knn", "score a backbone by its nearest neighbours"),
    "finetune": Command("eval.finetune", "train a backbone on labelled images and score it"),
    "visualize": Command("eval.visualize", "show what a backbone sees, on images or a video"),
    "linear": Command("eval.linear", "score a backbone by linear classifiers on its features"),
    "embed": Command("eval.embed", "write the features of images to a file"),
    "search": Command("eval.search", "find the nearest images of a gallery"),
    "duplicates": Command("eval.duplicates", "find near-duplicates, within and between sets"),
    "quality": Command("eval.quality", "judge features without labels"),
    "retrieval": Command("eval.retrieval", "find images of the same building (Oxford, Paris)"),
    "copydetect": Command("eval.copydetect", "find the original of an altered copy (Copydays)"),
    "video": Command("eval.video", "follow objects through videos (DAVIS)"),
    "logreg": Command("eval.logreg", "score a backbone by logistic regression on its features"),
    "fewshot": Command("eval.fewshot", "score a backbone by classifiers that see a few labels"),
    "launch": Command("launch.slurm", "run a command as a job, on Slurm or on processes here"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run(_dispatch, sys.argv[1:] if argv is None else argv)


def run(main_function: MainFunction, argv: list[str]) -> int:
    """Call ``main_function(argv)``; a person's mistake becomes `error: ...` and an exit code.

    The same door for `dino-kd`, `python -m dino_kd` and `python -m eval.knn`.
    """
    from dino_kd.config import HelpRequested

    prepare_process()
    try:
        code = main_function(argv) or 0
        sys.stdout.flush()
        return code
    except HelpRequested as asked:
        return _print_quietly(str(asked))
    except Interrupted as stopped:  # somebody asked for it: no error
        if _is_main():  # all processes of a job have agreed on it
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except UserError as error:
        with contextlib.suppress(KeyboardInterrupt):
            _let_main_go_first()
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_KEYBOARD
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # some other pipe, such as one to a loader process
        return EXIT_BROKEN_PIPE


def load_command(module: str) -> MainFunction:
    """Import a command's `main`.

    Raises UserError when a foreign package named `eval` or `launch` stands before ours.
    """
    package = module.partition(".")[0]
    if package != "dino_kd":
        _refuse_shadow(package, module)
    return importlib.import_module(module).main


def _dispatch(argv: list[str]) -> int | None:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help"):
        return _print_quietly(_help())
    if name in ("-V", "--version"):
        return _print_quietly(f"dino-kd {__version__}")
    if not name:
        raise ConfigError(f"no command given\n{_help()}")
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    if {"-h", "--help"} & set(rest) and name != "launch":  # which has commands of its own
        return _print_quietly(_command_help(name))
    return load_command(COMMANDS[name].module)(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: dino-kd COMMAND [CONFIG] [a.b=c ...]\n\n"
        + "\n".join(lines)
        + "\n\ndino-kd COMMAND --help lists every setting; dino-kd --version tells the version."
    )


def _command_help(name: str) -> str:
    from dino_kd.config import command_help
    from dino_kd.schema import COMMANDS as SCHEMAS

    if name in SCHEMAS:
        return command_help(name, SCHEMAS[name])
    return (  # the demo: its settings are those of a pretraining
        f"usage: dino-kd {name} [a.b=c ...]\n\n{COMMANDS[name].summary}\n\n"
        "Settings are those of 'dino-kd pretrain'; seed=1 for another run, run_dir=FOLDER to keep\n"
        "it elsewhere than in runs/demo, which the next demo replaces."
    )


def _is_main() -> bool:
    """Whether this is the main process of a job, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _let_main_go_first() -> None:
    """Under torchrun alone: other launchers may take a process that they end for interrupted."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not _is_main():
        time.sleep(HEAD_START)


def _print_quietly(text: str) -> int:
    """Print; a reader that stops early (`| head`) is no error."""
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:
        _reader_is_gone()
        return EXIT_BROKEN_PIPE
    return 0


def _print_error(error: UserError) -> None:
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    for problem in problems:
        text = f"error: {problem}\n"
        # a path may hold bytes that are no text in the terminal's encoding
        encoding = sys.stderr.encoding or "utf-8"
        sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _reader_is_gone() -> bool:
    """True when stdout's reader closed it; stdout then goes nowhere, so that exiting is quiet."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _refuse_shadow(package: str, module: str) -> None:
    ours = Path(__file__).resolve().parent.parent / package
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a half-imported foreign module
        spec = None
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if any(place.resolve() == ours for place in places):
        return
    if not ours.is_dir():
        raise UserError(f"cannot import {module}: dino_kd's own folder {ours} is missing")
    found = (spec.origin if spec else None) or (str(places[0]) if places else "nothing")
    raise UserError(
        f"cannot import {module}: {found} is another package named {package!r} and stands before "
        f"dino_kd's own at {ours}; take it off PYTHONPATH or use a clean virtual environment"
    )


if __name__ == "__main__":
    sys.exit(main())
