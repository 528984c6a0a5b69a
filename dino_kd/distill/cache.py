"""The teachers' answers on disk, each kept with the exact view that it belongs to.

An entry is one folder, named by a hash of everything that shapes the answers: the teachers, what is
asked of them, arithmetic, images, augmentation, seed and batches. The student, its loss and its
optimiser are no part of it. Files are shards of consecutive steps of one process. A step also
keeps image indices, mix and a checksum of the pixels; a batch that differs from them is answered by
the teachers. docs/distill_cache.md says when it pays.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_kd.cache_entries import ABOUT, GIGABYTE, cache_folder, hold, make_room, mark_used, size
from dino_kd.data.fingerprint import text_fingerprint
from dino_kd.data.mixing import Answers, Views
from dino_kd.distributed import all_gather_objects, is_main_process, on_main, rank, world_size
from dino_kd.engine.precision import autocast
from dino_kd.errors import ConfigError, Interrupted, UserError
from dino_kd.files import bytes_in_words, remove_leftovers, write_json, write_tensors
from dino_kd.models.linear_head import LinearHead
from dino_kd.schema import DistillConfig
from dino_kd.tasks.teacher import Teacher

SHARED_FOLDER = "teacher_cache"  # inside run_dir, while several students are trained
_FORMAT = 1  # raise it when the same identity would give other numbers
_SHARD_BYTES = 64 * 2**20
_SHARD_STEPS = 256
_TENSOR_OVERHEAD = 160  # bytes of a shard's header for each tensor, about
_FILE = "rank-{rank:04d}_steps-{first:09d}-{last:09d}.safetensors"
_PATTERN = re.compile(r"rank-(\d+)_steps-(\d+)-(\d+)\.safetensors")


def teacher_identity(teacher: Teacher, names: Sequence[str]) -> dict[str, Any]:
    """Plain values that fix the answers of one teacher to given pixels."""
    head = teacher.head
    return {
        "weights": teacher.fingerprint(),
        "network": text_fingerprint(repr(teacher)),
        "mean": list(teacher.backbone.mean),
        "std": list(teacher.backbone.std),
        "head_parts": list(head.parts) if isinstance(head, LinearHead) else None,
        "size": list(teacher.size),
        "names": sorted(names),
    }


@dataclass
class Kept:
    """The answers of one step of one process.

    Attributes:
        answers: of each teacher, by name; in fp16, or fp32 where fp16 would overflow.
        dtypes: what each was computed in, such as "bfloat16"; it is given out in that again.
        view: what was shown, from `view_of`.
    """

    answers: list[Answers]
    dtypes: dict[str, str]
    view: dict[str, Any]

    def restored(self) -> list[Answers]:
        """The answers as they are trained on."""
        return [
            {
                name: values.to(getattr(torch, self.dtypes[f"{number}/{name}"]))
                for name, values in one.items()
            }
            for number, one in enumerate(self.answers)
        ]


def keep(answers: Sequence[Answers], view: dict[str, Any]) -> Kept:
    """Answers rounded to fp16; a tensor with a finite value beyond fp16's range is kept in fp32."""
    dtypes = {
        f"{number}/{name}": str(values.dtype).removeprefix("torch.")
        for number, one in enumerate(answers)
        for name, values in one.items()
    }
    rounded = [{name: _rounded(values) for name, values in one.items()} for one in answers]
    return Kept(rounded, dtypes, view)


def view_of(views: Views) -> dict[str, Any]:
    """What a teacher was shown, as plain values: image indices, mix, checksum of the pixels.

    The partners in a mix are images of the same batch, so the mix fixes the rest.
    """
    mix = views.mix
    return {
        "indices": views.indices.tolist(),
        "own": None if mix is None else mix.own,
        "box": None if mix is None or mix.box is None else list(mix.box),
        "shape": list(views.images.shape),
        "crc32": zlib.crc32(views.images.cpu().contiguous().numpy().data),
    }


class Shards:
    """The files of one process in one entry: written in steps, read in any order.

    Args:
        entry: the folder; its name stands in every file.
        rank_number: of the process.
        warn: receives a sentence for every file that is damaged or belongs elsewhere; it is
            deleted, and its steps count as unknown.
        shard_bytes, shard_steps: a shard is written when it reaches either.
    """

    def __init__(
        self,
        entry: Path,
        rank_number: int,
        warn: Callable[[str], None],
        *,
        shard_bytes: int = _SHARD_BYTES,
        shard_steps: int = _SHARD_STEPS,
    ) -> None:
        self.entry, self.rank, self.warn = entry, rank_number, warn
        self.shard_bytes, self.shard_steps = shard_bytes, shard_steps
        self._pending: dict[int, Kept] = {}
        self._pending_bytes = 0
        self._path: Path | None = None  # of the shard that is open for reading
        self._file: Any = None
        self._about: dict[str, Any] = {}
        self._where: dict[int, Path] = {}
        for path in sorted(entry.glob("rank-*.safetensors")):
            found = _PATTERN.fullmatch(path.name)
            if found and int(found[1]) == rank_number:
                steps = range(int(found[2]), int(found[3]) + 1)
                self._where.update(dict.fromkeys(steps, path))

    def get(self, step: int) -> Kept | None:
        """What is kept of `step`; None when nothing is."""
        path = self._where.get(step)
        if path is None:
            return None
        try:
            if path != self._path:
                self._open(path)
            about = self._about["steps"][str(step)]
            answers: list[Answers] = [{} for _ in range(self._about["teachers"])]
            for key in about["dtypes"]:
                number, _, name = key.partition("/")
                answers[int(number)][name] = self._file.get_tensor(f"{step}/{key}")
            return Kept(answers, about["dtypes"], about["view"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            self._forget(path, error)
            return None

    def put(self, step: int, kept: Kept) -> None:
        """Keep one more step. Raises UserError when the disk is full."""
        if self._pending and step != max(self._pending) + 1:
            self.flush()
        on_cpu = [{name: v.detach().cpu() for name, v in one.items()} for one in kept.answers]
        self._pending[step] = Kept(on_cpu, kept.dtypes, kept.view)
        self._pending_bytes += sum(v.nbytes for one in on_cpu for v in one.values())
        if self._pending_bytes >= self.shard_bytes or len(self._pending) >= self.shard_steps:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet. Raises UserError when the disk is full."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        first, last = min(pending), max(pending)
        path = self.entry / _FILE.format(rank=self.rank, first=first, last=last)
        tensors = {
            f"{step}/{number}/{name}": values
            for step, kept in pending.items()
            for number, one in enumerate(kept.answers)
            for name, values in one.items()
        }
        about = {
            "entry": self.entry.name,
            "rank": self.rank,
            "teachers": len(next(iter(pending.values())).answers),
            "steps": {
                str(step): {"dtypes": kept.dtypes, "view": kept.view}
                for step, kept in pending.items()
            },
        }
        write_tensors(path, tensors, {"about": json.dumps(about)}, setting="cache")
        self._where.update(dict.fromkeys(pending, path))

    def _open(self, path: Path) -> None:
        self._path = None
        self._file = safe_open(path, "pt").__enter__()  # closed when it is let go
        self._about = json.loads((self._file.metadata() or {})["about"])
        if (self._about["entry"], self._about["rank"]) != (self.entry.name, self.rank):
            raise ValueError(f"it belongs to entry {self._about['entry']}")
        self._path = path

    def _forget(self, path: Path, error: Exception) -> None:
        self.warn(
            f"cache: {path} is damaged or foreign ({error}); it is deleted, and the teacher "
            "answers these steps again"
        )
        self._path = self._file = None
        self._where = {step: other for step, other in self._where.items() if other != path}
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@dataclass
class TeacherCache:
    """Attaches the answers of frozen teachers to batches: from disk, else computed and kept.

    What it attaches is rounded to fp16 either way, so a run that fills it and one that reads it
    train on the same values. Under torchrun every process has its own and calls the same methods.

    Attributes:
        teachers, names: who answers, and what each is asked for.
        folder: holds the entries.
        identity: plain values that fix everything else: images, augmentation, seed, batches.
        limit_gb: of the folder.
        device, precision: of the teachers' forward pass.
        accumulate: parts in which a batch is answered.
        say, warn: receive sentences.
        read, computed, differing: steps of this process so far; `differing` ones are computed too.
    """

    teachers: Sequence[Teacher]
    names: Sequence[Sequence[str]]
    folder: Path
    identity: Mapping[str, Any]
    limit_gb: float
    device: torch.device
    precision: str
    accumulate: int
    say: Callable[[str], None]
    warn: Callable[[str], None]
    read: int = field(default=0, init=False)
    computed: int = field(default=0, init=False)
    differing: int = field(default=0, init=False)
    _shards: Shards | None = field(default=None, init=False)
    _lock: BinaryIO | None = field(default=None, init=False)

    @functools.cached_property
    def entry(self) -> Path:
        """The folder of exactly these answers."""
        text = json.dumps(self._about, sort_keys=True)
        return self.folder / text_fingerprint(text)[:32]

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        """Everything that shapes the answers; hashing the teachers' weights takes a while."""
        asked = zip(self.teachers, self.names, strict=True)
        return {
            "format": _FORMAT,
            "teachers": [teacher_identity(teacher, names) for teacher, names in asked],
            "precision": self.precision,
            "world_size": world_size(),
            **self.identity,
        }

    def bytes_per_image(self) -> int:
        """Of the answers to one image, as they are kept."""
        total = 0
        for teacher, names in zip(self.teachers, self.names, strict=True):
            black = torch.zeros(1, teacher.backbone.in_chans, *teacher.size, device=self.device)
            total += sum(2 * v.numel() for v in teacher.answers(black, names).values())
        return total

    def open(self, batch_size: int, total_steps: int) -> bool:
        """Claim the entry and make room for a whole run; every process calls it.

        Returns False, after a sentence, when the temporary cache of several students would
        exceed its limit: the teachers then answer every student anew.

        Raises:
            ConfigError: the entry would exceed `cache_limit`.
            UserError: it does not fit on the disk, or the folder cannot be written.
        """
        overhead = world_size() * _TENSOR_OVERHEAD * sum(map(len, self.names))
        step_bytes = batch_size * (self.bytes_per_image() + 8) + overhead
        whole = total_steps * step_bytes
        if not on_main(functools.partial(self._claim, whole, step_bytes, total_steps)):
            return False
        self._lock = hold(self.entry)
        self._shards = Shards(self.entry, rank(), self.warn)
        return True

    def _claim(self, whole: int, step_bytes: int, total_steps: int) -> bool:
        """On the main process: check the size, write the identity, delete others."""
        sizes = (
            f"{bytes_in_words(whole)} for {total_steps:,} steps of {bytes_in_words(step_bytes)} in "
            f"{self.entry}"
        )
        if whole > self.limit_gb * GIGABYTE:
            if self.folder.name == SHARED_FOLDER:
                self.say(
                    f"the teacher answers every student anew: keeping its answers takes {sizes}, "
                    f"more than cache_limit={self.limit_gb:g} GB"
                )
                return False
            raise ConfigError(
                f"cache: the teacher's answers take {sizes}, more than cache_limit="
                f"{self.limit_gb:g} GB. Raise cache_limit to {math.ceil(whole / GIGABYTE)}, "
                "shorten optim.length, use terms without dense maps, or set cache=off"
            )
        self.say(f"cache: the teacher's answers take {sizes}")
        if _read_json(self.entry / ABOUT) != json.loads(json.dumps(self._about)):
            if self.entry.is_dir() and any(self.entry.glob("*.safetensors")):
                self.warn(f"cache: {self.entry} does not say what it holds; it is filled anew")
                shutil.rmtree(self.entry, ignore_errors=True)
            try:
                write_json(self.entry / ABOUT, self._about)
            except UserError as error:
                raise UserError(str(error).replace("run_dir", "cache")) from error
        remove_leftovers(self.entry)
        mark_used(self.entry)
        make_room(self.folder, self.limit_gb * GIGABYTE, keep=self.entry, reserve=whole)
        free, missing = shutil.disk_usage(self.entry).free, whole - size(self.entry)
        if missing > free:
            raise UserError(
                f"cache: the disk of {self.folder} has {bytes_in_words(free)} left, the teacher's "
                f"answers need {bytes_in_words(missing)} more; free some space, choose another "
                "folder, or set cache=off"
            )
        return True

    def answered(
        self, batches: Generator[Views, None, None], start_step: int
    ) -> Generator[Views, None, None]:
        """The same batches with answers. Raises UserError when the disk is full."""
        assert self._shards is not None  # `open` has said yes
        try:
            for step, views in enumerate(batches, start=start_step):
                view = view_of(views)
                kept = self._shards.get(step)
                if kept is not None and kept.view == view:
                    self.read += 1
                else:
                    views = views.to(self.device)
                    made = keep(self.ask(views), view)
                    self.computed += 1
                    if kept is None:
                        self._shards.put(step, made)
                    else:
                        self.differing += 1
                    kept = made
                views.answers = kept.restored()
                yield views
        finally:
            batches.close()

    @torch.no_grad()
    def ask(self, views: Views) -> list[Answers]:
        """The teachers' answers to a batch on the device, as the training step gets them live."""
        parts: list[list[Answers]] = []
        for part in views.chunk(self.accumulate):
            with autocast(self.precision, self.device):
                pixels = part.pixels()
                parts.append([
                    teacher.answers(pixels, names)
                    for teacher, names in zip(self.teachers, self.names, strict=True)
                ])  # fmt: skip
        return [
            {name: torch.cat([part[number][name] for part in parts]) for name in names}
            for number, names in enumerate(self.names)
        ]

    def flush(self) -> None:
        """Put on disk what was computed so far. Raises UserError when the disk is full."""
        if self._shards is not None:
            self._shards.flush()
            if is_main_process():
                mark_used(self.entry)

    def report(self) -> None:
        """Say what was read and what was computed; every process calls it."""
        rows = all_gather_objects([(self.read, self.computed, self.differing)])
        read, computed, differing = (max(column) for column in zip(*rows, strict=True))
        self.say(f"cache: {read:,} steps were read, the teacher answered {computed:,}")
        if differing:
            self.warn(
                f"cache: up to {differing:,} batches of a process are not the ones whose answers "
                f"are kept (an image was replaced, or Pillow or a driver has another version), so "
                f"the teacher answered them itself; delete {self.entry} to keep the new ones"
            )

    def close(self) -> None:
        """Flush, keep the folder below its limit, and let others delete the entry."""
        try:
            self.flush()
            if self._shards is not None and is_main_process():
                make_room(self.folder, self.limit_gb * GIGABYTE, keep=self.entry)
        finally:
            if self._lock is not None:
                self._lock.close()
            self._lock = self._shards = None


def teacher_folder(settings: DistillConfig) -> Path | None:
    """Where `cache` keeps answers; None when it is off. Raises ConfigError for a file."""
    return cache_folder(settings.cache, "teachers")


@contextlib.contextmanager
def shared_cache(settings: DistillConfig) -> Iterator[DistillConfig]:
    """The settings with which several students are trained from one pass of the teacher.

        with shared_cache(settings) as shared:
            for name in shared.students: distill(one_student(shared, name))

    With `cache=off` and more than one student they name a temporary folder inside run_dir: the
    first student fills it, the next ones read it. It is deleted at the end, but stays after an
    interruption, for the resumed run. Put students in the innermost loop: another seed or another
    teacher is another entry, and what was not used longest goes when `cache_limit` is reached.
    Students of other input sizes see other views, and so share nothing.
    """
    if settings.cache != "off" or len(settings.students) < 2:
        yield settings
        return
    folder = Path(settings.run_dir).expanduser().absolute() / SHARED_FOLDER
    goes_on = False
    try:
        yield settings.model_copy(update={"cache": str(folder)})
    except Interrupted:
        goes_on = True
        raise
    finally:
        if not goes_on and os.environ.get("RANK", "0") == "0":  # the group may be gone by now
            shutil.rmtree(folder, ignore_errors=True)


def _rounded(values: Tensor) -> Tensor:
    """In the memory layout that a file gives back: sums over another one differ in the last bit."""
    values = values.contiguous()
    half = values.to(torch.float16)
    overflows = (half.isinf() & values.isfinite()).any()
    return values.float() if overflows else half


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
