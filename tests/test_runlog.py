"""The run directory's log: exact numbers, one owner, no loss on a kill."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from dino_kd import runlog
from dino_kd.errors import ConfigError, UserError
from dino_kd.runlog import RunLog, make_tracker, read_broken

ROOT = Path(__file__).resolve().parents[1]


def open_log(run_dir: Path, *, is_main: bool = True, live: bool = False) -> RunLog:
    return RunLog(run_dir, is_main=is_main, tensorboard=False, tracker="none", live=live)


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# Numbers.


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-308, "c": math.pi * 1e20, "d": -0.0, "e": 5e-324}
    with open_log(tmp_path) as log:
        log.numbers(3, values)
    (row,) = rows(tmp_path)
    assert row.pop("step") == 3
    assert {k: v.hex() for k, v in row.items()} == {k: v.hex() for k, v in values.items()}


def test_non_finite_numbers_are_null_so_that_the_file_is_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    with open_log(tmp_path) as log:
        log.numbers(1, {"nan": math.nan, "inf": math.inf, "low": -math.inf, "fine": 1})
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "nan": None, "inf": None, "low": None, "fine": 1}


def test_numbers_are_on_disk_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.numbers(1, {"loss": 1.5})
    assert rows(tmp_path) == [{"step": 1, "loss": 1.5}]
    log.close()


def test_drop_from_keeps_earlier_rows_unchanged_and_drops_a_torn_line(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.numbers(step, {"loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    first_two = b"".join(path.read_bytes().splitlines(True)[:2])
    with path.open("ab") as file:
        file.write(b'{"step": 2, "loss": 0.')  # torn by a kill, and looks early
    with open_log(tmp_path) as log:
        log.drop_from(3)
        assert path.read_bytes() == first_two
        log.numbers(3, {"loss": 9.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("tail", [b"{", b'{"step": 1}', b"\0\0\0", b"\xff\xfe", b"3\n", b"{}\n"])
def test_drop_from_survives_any_torn_tail(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + tail)
    with open_log(tmp_path) as log:
        log.drop_from(5)
    assert path.read_bytes() == b'{"step": 0}\n'


def test_drop_from_in_the_middle_of_writing_goes_on_in_the_new_file(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.numbers(1, {})
        log.numbers(2, {})
        log.drop_from(2)
        log.numbers(2, {"again": 1.0})
    assert rows(tmp_path) == [{"step": 1}, {"step": 2, "again": 1.0}]


def test_a_torn_line_never_joins_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "lo')
    with open_log(tmp_path) as log:
        log.numbers(2, {})
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b'\n{"step": 2}\n')


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with open_log(tmp_path) as log, pytest.raises(UserError, match="the disk is full"):
        log.numbers(1, {"loss": 1.0})


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = open_log(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot write"):
        log.lock()


# One owner.

HOLD = """
import sys, time
from dino_kd.runlog import RunLog
log = RunLog(sys.argv[1], is_main=True, tensorboard=False, tracker="none", live=False)
log.lock()
if len(sys.argv) > 2:
    import os
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def hold(run_dir: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir), *words],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.dist
def test_a_second_process_is_told_who_holds_the_run_and_a_kill_frees_it(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            open_log(tmp_path).lock()
        pattern = rf"run directory {tmp_path} is in use by process {holder.pid} on host \S+ since 2"
        assert re.search(pattern, str(caught.value))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_log(tmp_path) as log:
        log.lock()


@pytest.mark.dist
def test_a_loader_process_that_outlives_the_run_does_not_hold_it(tmp_path: Path) -> None:
    """A forked child keeps a copy of every open file, and with it would keep the lock."""
    holder = hold(tmp_path, "with a child")
    assert holder.stdout is not None
    child = None
    try:
        child = int(holder.stdout.readline())
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        for patience in range(50, -1, -1):  # on a busy machine the child may not have run yet
            try:
                with open_log(tmp_path) as log:
                    log.lock()
                break
            except UserError:
                if not patience:
                    raise
                time.sleep(0.2)
    finally:
        holder.kill()
        if child is not None:
            os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_the_lock_is_free_after_close_and_before_anything_is_written(tmp_path: Path) -> None:
    first, second = open_log(tmp_path), open_log(tmp_path)
    first.lock()
    first.lock()  # asking twice is fine
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        second.lock()
    first.close()
    second.lock()
    second.close()
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}


# Sentences and progress.


def test_sentences_go_to_the_console_and_with_the_time_to_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as log:
        log.say("hello")
        log.warn(f"odd {os.fsdecode(b'caf' + bytes([233]))}")
    shown = capsys.readouterr()
    assert shown.out == "hello\n"
    assert shown.err == "warning: odd caf\\udce9\n"
    lines = (tmp_path / "train.log").read_bytes().splitlines()
    assert re.fullmatch(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  hello", lines[0])
    assert lines[1].endswith(b"  warning: odd caf\xe9")


def test_without_a_terminal_progress_is_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step takes 4 s by a clock that the test turns: lines at 0, 12, 24, 36 s and the end."""
    clock = [0.0]
    monkeypatch.setattr(runlog, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with open_log(tmp_path) as log:
        for step in range(1, 12):
            values = {"loss": 2.0, "images_per_s": 321.4, "data_wait": 0.034}
            log.progress(step, 11, values)
            clock[0] += 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/11", "4/11", "7/11", "10/11", "11/11"]
    assert lines[0].endswith("ETA ?")
    assert lines[1] == ("step 4/11  loss 2.0000  321 img/s  3% waiting for data  ETA 0:00:28")
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition("  ")[2] for line in logged] == lines


def test_on_a_terminal_progress_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, live=True) as log:
        for step in range(1, 4):
            log.progress(step, 3, {"loss": 2.0, "images_per_s": 30.0, "data_wait": 0.5})
        log.say("a sentence beside the bar")
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "loss 2.0000  30 img/s  50% waiting for data" in shown.err
    assert shown.out == "a sentence beside the bar\n"


# Environment and broken images.


def test_environment_tells_versions_command_and_earlier_parts(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for device in ("cpu", "cuda"):
            log.write_environment({"device": device})
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["device"] == "cuda"
    assert [earlier["device"] for earlier in environment["earlier"]] == ["cpu"]
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(environment["versions"]) >= {"dino_kd", "torch", "timm", "torchvision"}
    assert {"started", "command", "host", "commit", "cpu_cores"} <= set(environment)


def test_the_commit_says_when_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "dino_kd"
    package.mkdir()
    monkeypatch.setattr(runlog, "__file__", str(package / "runlog.py"))
    assert runlog._commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert runlog._commit() is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = runlog._commit()
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "new").write_text("")
    assert runlog._commit() == f"{commit}+changes"


def test_broken_images_are_listed_once_also_after_a_resume(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    with open_log(tmp_path) as log:
        assert log.broken([]) == 0
        assert log.broken([("a.jpg", "truncated"), ("a.jpg", "truncated"), (odd, "no image")]) == 2
    with open_log(tmp_path) as log:
        assert log.broken([("a.jpg", "truncated"), (odd, "no image"), ("b\tc\n.jpg", "x\ny")]) == 3
    assert (tmp_path / "broken_images.txt").read_bytes() == (
        b"a.jpg\ttruncated\ncaf\xe9.jpg\tno image\nb\\tc\\n.jpg\tx\\ny\n"
    )
    assert read_broken(tmp_path) == ["a.jpg", odd, "b\\tc\\n.jpg"]
    assert read_broken(tmp_path / "nothing") == []


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", is_main=False, tensorboard=True, tracker="wandb") as log:
        log.lock()
        log.say("x")
        log.warn("x")
        log.numbers(1, {"loss": 1.0})
        log.progress(1, 2, {})
        log.drop_from(0)
        log.write_environment({})
        assert log.broken([("a", "b")]) == 0
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


# Trackers and TensorBoard.


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"log.tracker: .*pip install {name}"):
        RunLog(tmp_path, is_main=True, tensorboard=False, tracker=name)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        make_tracker(name, tmp_path)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected none, wandb or mlflow, got 'comet'"):
        RunLog(tmp_path, is_main=True, tensorboard=False, tracker="comet")


def test_a_tracker_receives_the_finite_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(runlog, "_require_tracker", lambda name: None)
    monkeypatch.setattr(
        runlog, "make_tracker", lambda name, run_dir: lambda step, v: sent.append((name, step, v))
    )
    with RunLog(tmp_path, is_main=True, tensorboard=False, tracker="mlflow") as log:
        log.numbers(4, {"loss": 1.0, "bad": math.nan})
    assert sent == [("mlflow", 4, {"loss": 1.0})]


def test_tensorboard_that_is_absent_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it now fails
    with RunLog(tmp_path, is_main=True, tensorboard=True, tracker="none") as log:
        log.numbers(1, {"loss": 1.0})
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.slow
def test_tensorboard_receives_the_numbers(tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, is_main=True, tensorboard=True, tracker="none") as log:
        for step in (1, 2):
            log.numbers(step, {"loss": 1.0 / step})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


def test_writing_a_row_is_cheap(tmp_path: Path) -> None:
    """20 numbers in well under a millisecond, the best of three stretches."""
    values = {f"metric_{i}": i / 7 for i in range(20)}
    best = math.inf
    with open_log(tmp_path) as log:
        for _ in range(3):
            start = time.perf_counter()
            for step in range(100):
                log.numbers(step, values)
            best = min(best, (time.perf_counter() - start) / 100)
    assert best < 1e-3
