"""The errors a person can cause, and the exit codes they end with.

Everything derived from `UserError` is printed as plain sentences, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2  # a mistake that a person can mend: path, setting, data, disk
EXIT_DIVERGED = 4  # training stopped itself: too many non-finite steps
EXIT_INTERRUPTED = 75  # a signal ended the run after a checkpoint; the same command resumes it


class UserError(Exception):
    """Something the user can mend. The message says what, the value found, what is accepted."""

    exit_code = EXIT_USER_ERROR


class ConfigError(UserError):
    """One or more settings are wrong; `problems` holds one sentence for each."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A dataset is missing, empty, too small, or holds too many broken images."""


class CheckpointError(UserError):
    """A checkpoint or backbone file is missing, damaged, or does not fit the network."""


class Diverged(UserError):  # noqa: N818 - reads as a statement
    """Training met too many non-finite losses or gradients in a row."""

    exit_code = EXIT_DIVERGED


class Interrupted(UserError):  # noqa: N818 - reads as a statement
    """A signal asked the run to end; its state is saved."""

    exit_code = EXIT_INTERRUPTED


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence ending such as ``; did you mean 'adamw'?``, empty when nothing is near."""
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def unknown_name(kind: str, name: str, choices: Iterable[str], where: str = "") -> ConfigError:
    """The error for a name that is not in a registry: near matches, then what is accepted."""
    choices = sorted(choices)
    accepted = f" Accepted: {', '.join(choices)}." if len(choices) <= 30 else ""
    prefix = f"{where}: " if where else ""
    return ConfigError(
        f"{prefix}unknown {kind} {name!r}{did_you_mean(name, choices) or '.'}{accepted}"
    )
