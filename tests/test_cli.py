"""`dino-kd`: what it prints, how fast, and with which exit code it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_kd import __version__, cli
from dino_kd.errors import ConfigError, DataError, Diverged, Interrupted, UserError

ROOT = Path(__file__).resolve().parents[1]


def dino_kd(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dino_kd.cli", *words],
        capture_output=True, text=True, timeout=60, **{"cwd": ROOT, **options},  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--help"], ["knn", "-h"], ["demo", "-h"]]
)
def test_help_answers_in_half_a_second_without_torch(words: list[str]) -> None:
    """Processor time, best of three: on an idle machine that is the time one waits."""
    code = (
        "import sys, time; from dino_kd.cli import main; code = main(sys.argv[1:]);"
        "print(time.process_time(), file=sys.stderr); sys.exit(code or 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: dino-kd")
        seconds.append(float(done.stderr))
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5


def test_help_names_every_command_and_version_the_version(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name}" in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dino-kd {__version__}\n"


def test_unknown_command_is_named_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretain"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command 'pretain'; did you mean 'pretrain'?")


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: dino-kd COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("sentence"), 2),
        (DataError("sentence"), 2),
        (Diverged("sentence"), 4),
        (Interrupted("sentence"), 75),
    ],
)
def test_user_errors_are_sentences_with_their_exit_code(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    assert cli.run(fail, []) == code
    prefix = "" if isinstance(error, Interrupted) else "error: "  # a requested stop is none
    assert capsys.readouterr().err == f"{prefix}sentence\n"


def test_each_problem_has_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        raise ConfigError(argv)

    assert cli.run(fail, ["first", "second"]) == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"


def test_a_path_that_is_no_text_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        raise UserError(os.fsdecode(b"caf\xe9.jpg"))

    assert cli.run(fail, []) == 2
    assert "caf\\udce9.jpg" in capsys.readouterr().err


def test_control_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def wait(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert cli.run(wait, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_bugs_keep_their_traceback() -> None:
    def bug(argv: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(bug, [])


def test_a_broken_pipe_elsewhere_is_not_hidden() -> None:
    def lost_worker(argv: list[str]) -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli.run(lost_worker, [])


def test_a_reader_that_stops_early_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dino_kd.cli", "pretrain", "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert error == b""
    assert process.returncode == cli.EXIT_BROKEN_PIPE


@pytest.mark.parametrize(("rank", "said"), [("0", "stopped\n"), ("1", "")])
def test_a_job_says_once_that_it_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, said: str
) -> None:
    def stop(argv: list[str]) -> int:
        raise Interrupted("stopped")

    monkeypatch.setenv("RANK", rank)
    assert cli.run(stop, []) == Interrupted.exit_code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("torchrun", [True, False])
def test_the_main_process_under_torchrun_tells_an_error_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, torchrun: bool
) -> None:
    """Other launchers may take one that they end while it waits for one that was interrupted."""

    def fail(argv: list[str]) -> int:
        raise UserError("no such file")

    waits: list[tuple[float, str]] = []
    monkeypatch.setattr(time, "sleep", lambda s: waits.append((s, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.run(fail, []) == UserError.exit_code
    waits_for_main = torchrun and rank == "1"
    assert waits == ([(cli.HEAD_START, "")] if waits_for_main else [])  # nothing was said before
    assert capsys.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize("with_module", [False, True])
def test_a_foreign_package_in_the_way_is_named(tmp_path: Path, with_module: bool) -> None:
    """A package named `eval` earlier on the path, without and with a module of our name."""
    foreign = tmp_path / "eval"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    if with_module:
        (foreign / "knn.py").write_text("def main(argv): print('foreign')")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}];"
        "from dino_kd.cli import main; sys.exit(main(['knn', 'k=5']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(foreign / "__init__.py") in line
    assert "another package named 'eval'" in line
    assert "PYTHONPATH" in line


def test_every_command_has_a_main() -> None:
    """The strings in the table against the files; nothing is imported."""
    for command in cli.COMMANDS.values():
        file = ROOT / f"{command.module.replace('.', '/')}.py"
        assert "def main(argv: list[str]" in file.read_text(encoding="utf-8"), file
