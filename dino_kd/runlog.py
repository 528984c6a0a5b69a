"""What a run writes for people and programs: sentences, numbers, environment, broken images.

One `RunLog` owns the run directory on the main process; on every other rank all of it does
nothing. Files: train.log, metrics.jsonl, env.json, broken_images.txt, run.lock.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dino_kd import __version__
from dino_kd.errors import ConfigError, UserError
from dino_kd.files import disk_error, write_atomic, write_json

try:
    import fcntl
except ImportError:  # Windows has no flock; runs are not locked there
    fcntl = None  # type: ignore[assignment]

SECONDS_BETWEEN_LINES = 10.0  # of progress, when there is no terminal

Sink = Callable[[int, dict[str, float]], None]


class RunLog:
    """Writes the run directory's log files; does nothing when `is_main` is False.

    Nothing is written before the first call, so that `lock` can come first.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        is_main: bool,
        tensorboard: bool = False,
        tracker: str = "none",
        live: bool | None = None,
    ) -> None:
        """`live` chooses the progress bar; None: a bar when stderr is a terminal.

        Raises ConfigError when the tracker's package is not installed.
        """
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self.live = sys.stderr.isatty() if live is None else live
        self._wants_tensorboard = tensorboard
        self._tracker = tracker
        self._lock: BinaryIO | None = None
        self._files: dict[str, BinaryIO] = {}
        self._sinks: list[Sink] | None = None
        self._first_new_step: int | None = None
        self._broken: set[str] | None = None
        self._bar: Any = None
        self._pace: _Pace | None = None
        self._on_close: list[Callable[[], None]] = []
        if is_main:
            _require_tracker(tracker)

    def lock(self) -> None:
        """Claim the run directory until `close` or the end of the process, however it ends.

        Raises UserError when another process holds it: which, where, and since when.
        """
        if not self.is_main or fcntl is None or self._lock is not None:
            return
        path = self.run_dir / "run.lock"
        with _plain_disk_errors(path):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(file)
            file.close()
            raise UserError(
                f"run directory {self.run_dir} is in use by {holder}; "
                "wait for it, stop it, or choose another run_dir"
            ) from error
        except OSError as error:  # a network disk without locks
            file.close()
            self.warn(f"cannot lock {self.run_dir} ({error.strerror}); start only one run in it")
            return
        self._lock = file
        _forget_in_children(self)
        with _plain_disk_errors(path):
            file.truncate(0)
            holder_now = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
            file.write(json.dumps(holder_now).encode())
            file.flush()

    def say(self, text: str) -> None:
        """A sentence for the console and, with the time, for train.log."""
        self._say(text, sys.stdout)

    def warn(self, text: str) -> None:
        """A sentence that asks for attention; goes to stderr and train.log."""
        self._say(f"warning: {text}", sys.stderr)

    def record(self, text: str) -> None:
        """A sentence for train.log alone: why the run ends, which the command itself will print."""
        if self.is_main:
            self._append("train.log", f"{_now()}  {text}\n")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard and the tracker.

        Floats read back exactly; nan and inf become null, so that the file is strict JSON.
        Raises UserError when the disk is full.
        """
        if not self.is_main:
            return
        row = {"step": step, **{name: _number(value) for name, value in values.items()}}
        self._append("metrics.jsonl", json.dumps(row, allow_nan=False) + "\n")
        if self._sinks is None:
            self._sinks = list(self._make_sinks())
        finite = {k: v for k, v in row.items() if k != "step" and v is not None}
        for sink in self._sinks:
            with _plain_disk_errors(self.run_dir):
                sink(step, finite)

    def progress(self, step: int, total: int, values: Mapping[str, float | str]) -> None:
        """Show that `step` of `total` steps are done, with `values` such as the loss.

        `images_per_s` and `data_wait` (a share of the time, 0..1) are shown in words. A bar on a
        terminal; otherwise, and in train.log, plain lines at most every 10 seconds, and for the
        first and last step.
        """
        if not self.is_main:
            return
        if self._pace is None:
            self._pace = _Pace(step, total)
        is_due = self._pace.is_due(step)
        if not (self.live or is_due):
            return
        shown = "  ".join(_shown(name, value) for name, value in values.items())
        if self.live:
            self._move_bar(step, total, shown)
        if is_due:
            line = f"step {step}/{total}  {shown}  ETA {self._pace.time_left(step)}"
            if not self.live:
                self._print(line, sys.stdout)
            self._append("train.log", f"{_now()}  {line}\n")

    def drop_from(self, step: int) -> None:
        """Remove the rows of metrics.jsonl from `step` on, and a last line torn by a kill.

        For a resume from a checkpoint that is older than the last row.
        """
        if not self.is_main:
            return
        self._first_new_step = step
        path = self.run_dir / "metrics.jsonl"
        if path.is_file():
            self._close_file("metrics.jsonl")
            kept = [line for line in path.read_bytes().splitlines(True) if _is_before(line, step)]
            write_atomic(path, lambda temporary: _write_bytes(temporary, kept))

    def write_environment(self, extra: Mapping[str, Any] | None = None) -> None:
        """env.json: versions, commit, machine, command and start time, then `extra`.

        What earlier parts of a resumed run had written is kept under "earlier", oldest first.
        """
        if not self.is_main:
            return
        path = self.run_dir / "env.json"
        environment = {**_environment(), **(extra or {})}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            last = json.loads(path.read_text(encoding="utf-8"))
            environment["earlier"] = [*last.pop("earlier", []), last]
        write_json(path, environment)

    def broken(self, found: Iterable[tuple[str, str]]) -> int:
        """List (path, reason) in broken_images.txt, each path once, resumes included.

        Returns the number of different broken images of the run so far (0 on other ranks).
        """
        if not self.is_main:
            return 0
        if self._broken is None:
            self._broken = set(read_broken(self.run_dir))
        for path, reason in found:
            name = _one_line(path)
            if name not in self._broken:
                self._broken.add(name)
                self._append("broken_images.txt", f"{name}\t{_one_line(reason)}\n")
        return len(self._broken)

    def close(self) -> None:
        """Close every file and give the run directory free."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        for action in self._on_close:
            action()
        self._on_close, self._sinks = [], None
        for name in list(self._files):
            self._close_file(name)
        if self._lock is not None:
            self._lock.close()  # closing gives the lock free; the file stays, or two could hold it
            self._lock = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, text: str, stream: Any) -> None:
        if self.is_main:
            self._print(text, stream)
            self.record(text)

    def _print(self, text: str, stream: Any) -> None:
        encoding = stream.encoding or "utf-8"  # a path may hold what the terminal cannot show
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self._bar is not None:
            self._bar.write(text, file=stream)
        else:
            print(text, file=stream, flush=True)

    def _move_bar(self, step: int, total: int, shown: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr
            )
            return
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def _append(self, name: str, text: str) -> None:
        """Add whole lines in one write, so that a kill can tear at most the last one."""
        path = self.run_dir / name
        with _plain_disk_errors(path):
            if name not in self._files:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self._files[name] = path.open("ab", buffering=0)
                if _ends_torn(path):
                    self._files[name].write(b"\n")
            # names of files need not be UTF-8; their bytes pass through unchanged
            rest = text.encode("utf-8", "surrogateescape")
            while rest:  # a nearly full disk takes a part; the next write then says why
                rest = rest[self._files[name].write(rest) :]

    def _close_file(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            file.close()

    def _make_sinks(self) -> Iterator[Sink]:
        writer = (
            _tensorboard(self.run_dir, self._first_new_step) if self._wants_tensorboard else None
        )
        if writer is not None:
            self._on_close.append(writer.close)

            def to_tensorboard(step: int, values: dict[str, float]) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

            yield to_tensorboard
        if self._tracker != "none":
            yield self._forgiving(make_tracker(self._tracker, self.run_dir))

    def _forgiving(self, sink: Sink) -> Sink:
        """A tracker that is left out, with one warning, once it cannot be reached."""
        lost = False

        def send(step: int, values: dict[str, float]) -> None:
            nonlocal lost
            if lost:
                return
            try:
                sink(step, values)
            except OSError as error:  # requests' ConnectionError is one
                lost = True
                self.warn(f"log.tracker={self._tracker} failed and is left out now: {error}")

        return send


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, oldest first; numbers that were not finite are left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def read_broken(run_dir: str | Path) -> list[str]:
    """The paths listed in broken_images.txt; names that are no UTF-8 come back as os.fsdecode's."""
    path = Path(run_dir) / "broken_images.txt"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [os.fsdecode(line.partition(b"\t")[0]) for line in lines]


def make_tracker(name: str, run_dir: str | Path) -> Sink:
    """A function ``(step, values)`` that sends numbers to "wandb" or "mlflow".

    Raises ConfigError when the package is not installed.
    """
    _require_tracker(name)
    run_dir = Path(run_dir)
    if name == "wandb":
        import wandb

        run = wandb.init(dir=str(run_dir), name=run_dir.name, resume="allow")
        return lambda step, values: run.log(values, step=step)
    import mlflow

    mlflow.start_run(run_name=run_dir.name)
    return lambda step, values: mlflow.log_metrics(values, step=step)


def _require_tracker(name: str) -> None:
    if name not in ("none", "wandb", "mlflow"):
        raise ConfigError(f"log.tracker: expected none, wandb or mlflow, got {name!r}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"log.tracker: {name!r} needs the package {name}, which is not installed; "
            f"pip install {name}, or set log.tracker=none"
        )


def _tensorboard(run_dir: Path, first_new_step: int | None) -> Any:
    """A SummaryWriter that hides earlier points from `first_new_step` on; None if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=first_new_step)


class _Pace:
    """When a progress line is due, and how long the rest will take."""

    def __init__(self, step: int, total: int) -> None:
        self.first_step, self.total = step, total
        self.start = time.monotonic()
        self.last_line: float | None = None

    def is_due(self, step: int) -> bool:
        now = time.monotonic()
        early = self.last_line is not None and now - self.last_line < SECONDS_BETWEEN_LINES
        if early and step < self.total:
            return False
        self.last_line = now
        return True

    def time_left(self, step: int) -> str:
        done = step - self.first_step
        if not done:
            return "?"
        seconds = (time.monotonic() - self.start) / done * (self.total - step)
        return str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def _plain_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def _forget_in_children(log: RunLog) -> None:
    """Close a forked child's copy of the lock.

    A loader process outlives a killed main process by seconds and would keep the lock held.
    """
    reference = weakref.ref(log)

    def forget() -> None:
        parent = reference()
        if parent is not None and parent._lock is not None:
            parent._lock.close()
            parent._lock = None

    os.register_at_fork(after_in_child=forget)


def _read_holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['process']} on host {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # the other process has not written it yet
        return "another process"


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "started": _now(),
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "commit": _commit(),
        "versions": {"dino_kd": __version__, "python": platform.python_version()},
    }
    for package in ("torch", "torchvision", "timm", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["versions"][package] = metadata.version(package)
    torch = sys.modules.get("torch")  # never the reason for a slow import
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _commit() -> str | None:
    """The checkout's commit, with "+changes" when files differ from it; None when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _now() -> str:
    return datetime.now().isoformat(sep=" ", timespec="seconds")


def _number(value: Any) -> float | int | None:
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _shown(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name == "images_per_s":
        return f"{value:.3g} img/s" if value < 100 else f"{value:.0f} img/s"
    if name == "data_wait":
        return f"{value:.0%} waiting for data"
    return f"{name} {value:.4f}"


def _is_before(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] < step) and line.endswith(b"\n")
    except (ValueError, KeyError, TypeError):  # torn
        return False


def _ends_torn(path: Path) -> bool:
    if not path.stat().st_size or not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _write_bytes(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(lines))


def _one_line(text: str) -> str:
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
