"""Files of the cache of teachers' answers: size, limits, damage, foreign files, processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dino_kd.cache_entries import hold, make_room
from dino_kd.config import load_settings
from dino_kd.distill import cache as cache_module
from dino_kd.distill.cache import SHARED_FOLDER, Shards, TeacherCache, keep, shared_cache
from dino_kd.distill.story import distill
from dino_kd.errors import Interrupted, UserError
from dino_kd.schema import DistillConfig
from tests.tiny import read_metrics, write_images

VIT = "vit_tiny_patch16_224"
STUDENT = "student.args={patch_size: 8, depth: 1, embed_dim: 16, num_heads: 2}"
TINY = [
    "device=cpu", "data.num_workers=0", f"student.backbone={VIT}", "student.image_size=16", STUDENT,
    "terms.preset=label_free", "terms.cosine_kd.hidden_dim=16", "terms.cosine_kd.layers=2",
    "optim.batch_size=8", "optim.length=6", "optim.precision=fp32", "recalibrate=0",
    "log.log_every=1", "log.save_every=100", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), side=24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a small ViT of fixed weights."""
    from dino_kd.models.backbone import create_backbone
    from dino_kd.pretrained import save_backbone

    torch.manual_seed(3)
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = create_backbone(VIT, img_size=16, patch_size=8, args=args)
    folder = tmp_path_factory.mktemp("teacher") / "backbone"
    save_backbone(backbone, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def run(images, teacher, tmp_path):
    """Distil in a folder of its own; returns the losses."""

    def go(name, *words, cache="cache"):
        settings = load_settings(
            DistillConfig,
            [*TINY, f"data.train={images}", f"teacher.backbone={teacher}",
             f"cache={cache if cache == 'off' else tmp_path / cache}",
             f"run_dir={tmp_path / name}", *words],
            command="distill",
        )  # fmt: skip
        distill(settings)
        return [row["loss"] for row in read_metrics(tmp_path / name)]

    return go


@pytest.fixture
def asked(monkeypatch):
    """How many batches the cache had the teachers answer."""
    sizes = []
    ask = TeacherCache.ask

    def counted(self, views):
        sizes.append(len(views.labels))
        return ask(self, views)

    monkeypatch.setattr(TeacherCache, "ask", counted)
    return sizes


def log_of(run_dir: Path) -> str:
    return (run_dir / "train.log").read_text()


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_filling_and_reading_give_the_losses_of_a_run_without_cache(run, asked, tmp_path):
    """20 steps with mixup: fill == read bit for bit; off differs by fp16's rounding alone."""
    longer = ["optim.length=20", "augment.mix_share=0.5", "augment.cutmix=1"]
    off = run("off", *longer, cache="off")
    filled = run("fill", *longer)
    assert asked == [8] * 20
    read = run("read", *longer)
    assert asked == [8] * 20
    assert read == filled
    assert len(off) == 20
    np.testing.assert_allclose(filled, off, rtol=1e-3)
    assert filled != off  # the cache was really in use
    assert "20 steps were read, the teacher answered 0" in log_of(tmp_path / "read")
    mixed = [
        step["view"]["own"] is not None
        for path in tmp_path.glob("cache/*/*.safetensors")
        for step in shard_about(path)["steps"].values()
    ]
    assert 0 < sum(mixed) < 20


def test_the_size_that_is_announced_is_the_size_on_disk(run, tmp_path):
    run("fill", "terms.feature_kd.weight=1")
    (entry,) = entries(tmp_path / "cache")
    (line,) = [x for x in log_of(tmp_path / "fill").splitlines() if "answers take" in x]
    words = line.partition("take ")[2].split()
    announced = float(words[0]) * {"kB": 1e3, "B": 1}[words[1]]
    tensors = sum(
        v.nbytes for path in entry.glob("*.safetensors") for v in load_file(path).values()
    )
    assert tensors <= announced < 1.5 * tensors


@pytest.mark.parametrize(
    "words",
    [
        ("student.args={patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}",),
        ("optim.base_lr=0.1",),
        ("terms.cosine_kd.weight=7",),
        ("optim.accumulate=2",),
        ("optim.length=4",),
    ],
)
def test_what_is_no_part_of_the_key_reads_the_same_entry(run, asked, tmp_path, words):
    run("first")
    run("second", *words)
    assert asked == [8] * 6
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("augment.scale=[0.5, 1.0]",),
        ("augment.mix_share=0.9",),
        ("seed=1",),
        ("optim.batch_size=4",),
        ("student.image_size=24",),
        ("teacher.image_size=32",),
        ("terms.feature_kd.weight=1",),
        ("terms.attention_kd.weight=1", "terms.attention_kd.strides=[8]"),
    ],
)
def test_what_changes_the_answers_is_another_entry(run, asked, tmp_path, words):
    run("first", "optim.length=2")
    run("second", "optim.length=2", *words)
    assert len(asked) == 4
    assert len(entries(tmp_path / "cache")) == 2


def test_other_weights_and_other_normalisation_are_another_entry(run, asked, teacher, tmp_path):
    run("first", "optim.length=2")
    source = Path(teacher.removeprefix("local-dir:"))
    other = shutil.copytree(source, tmp_path / "weights")
    tensors = load_file(other / "model.safetensors")
    tensors["cls_token"] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    run("second", "optim.length=2", f"teacher.backbone=local-dir:{other}")
    assert len(asked) == 4
    other = shutil.copytree(source, tmp_path / "mean")
    config = json.loads((other / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (other / "config.json").write_text(json.dumps(config))
    run("third", "optim.length=2", f"teacher.backbone=local-dir:{other}")
    assert len(asked) == 6
    assert len(entries(tmp_path / "cache")) == 3


def test_a_longer_run_extends_the_entry(run, asked, tmp_path):
    run("short", "optim.length=4")
    run("long", "optim.length=9")
    assert asked == [8] * 9
    assert "4 steps were read, the teacher answered 5" in log_of(tmp_path / "long")
    run("again", "optim.length=9")
    assert len(asked) == 9


def shard_about(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])


def rewrite(path: Path, change) -> None:
    """Change a shard's text, keeping its tensors."""
    about = shard_about(path)
    change(about)
    save_file(load_file(path), path, {"about": json.dumps(about)})


def test_a_batch_that_differs_is_answered_live_and_reported(run, asked, tmp_path):
    filled = run("fill")
    (path,) = tmp_path.glob("cache/*/*.safetensors")

    def change(about):
        about["steps"]["1"]["view"]["crc32"] ^= 1
        about["steps"]["3"]["view"]["indices"].reverse()
        about["steps"]["4"]["view"]["own"] = 0.123

    rewrite(path, change)
    before = len(asked)
    assert run("read") == filled  # the wrong answers were not used
    assert len(asked) == before + 3
    assert "up to 3 batches" in log_of(tmp_path / "read")


@pytest.mark.parametrize("harm", ["truncated", "foreign", "no_text"])
def test_a_damaged_or_foreign_file_is_made_again(run, asked, tmp_path, harm):
    filled = run("fill")
    (path,) = tmp_path.glob("cache/*/*.safetensors")
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif harm == "foreign":
        rewrite(path, lambda about: about.update(entry="0" * 32))
    else:
        save_file(load_file(path), path)
    assert run("read") == filled
    assert len(asked) == 12
    assert "is damaged or foreign" in log_of(tmp_path / "read")
    assert run("again") == filled
    assert len(asked) == 12


def test_an_entry_that_says_it_is_another_is_filled_anew(run, asked, tmp_path):
    filled = run("fill")
    (entry,) = entries(tmp_path / "cache")
    about = json.loads((entry / "identity.json").read_text())
    about["teachers"][0]["weights"] = "f" * 64
    (entry / "identity.json").write_text(json.dumps(about))
    assert run("read") == filled
    assert len(asked) == 12
    assert "does not say what it holds" in log_of(tmp_path / "read")


def test_answers_belong_to_the_pixels_of_one_renderer(run, tmp_path):
    run("pillow", "data.renderer=pillow")
    run("torch", "data.renderer=torch")
    run("device", "data.renderer=device")
    assert len(entries(tmp_path / "cache")) == 3


def test_a_full_disk_names_the_cache(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match=r"cache: the disk of .* has 10 B left"):
        run("run")


def test_a_disk_that_fills_up_while_training_names_the_cache(run, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_tensors", _failing(cache_module.write_tensors, full))
    with pytest.raises(UserError, match=r"the disk is full; .* another cache"):
        run("run")


def _failing(write, fail):
    def wrapped(path, tensors, metadata=None, *, setting="run_dir"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", fail)
            write(path, tensors, metadata, setting=setting)

    return wrapped


def test_the_entry_unused_for_longest_goes_first(run, tmp_path):
    for seed in range(3):
        run(f"run{seed}", f"seed={seed}", "optim.length=2")
    folder = tmp_path / "cache"
    by_age = sorted(entries(folder), key=lambda e: (e / "identity.json").stat().st_mtime)
    size = sum(file.stat().st_size for entry in by_age[1:] for file in entry.iterdir())
    make_room(folder, size, keep=by_age[2])
    assert entries(folder) == sorted(by_age[1:])
    lock = hold(by_age[1])  # in use elsewhere
    make_room(folder, 1, keep=by_age[2])
    assert entries(folder) == sorted(by_age[1:])
    lock.close()
    make_room(folder, 1, keep=by_age[2])
    assert entries(folder) == [by_age[2]]


def test_values_beyond_fp16_are_kept_in_fp32_and_types_come_back(tmp_path):
    answers = [
        {"a": torch.tensor([[1.0, 1e5]]), "b": torch.tensor([[1 / 3]])},
        {"a": torch.tensor([[0.1, float("inf")]], dtype=torch.bfloat16)},
    ]
    kept = keep(answers, {"indices": [0]})
    shards = Shards(tmp_path, 0, pytest.fail)
    shards.put(0, kept)
    shards.flush()
    found = Shards(tmp_path, 0, pytest.fail).get(0).restored()
    assert torch.equal(found[0]["a"], answers[0]["a"])
    assert torch.equal(found[0]["b"], answers[0]["b"].half().float())
    assert found[1]["a"].dtype == torch.bfloat16
    assert torch.equal(found[1]["a"], answers[1]["a"])  # fp16 holds bf16's digits in its range
    (path,) = tmp_path.glob("*.safetensors")
    assert {str(v.dtype) for v in load_file(path).values()} == {"torch.float16", "torch.float32"}


def test_shards_end_by_steps_bytes_and_gaps(tmp_path):
    shards = Shards(tmp_path, 3, pytest.fail, shard_steps=2, shard_bytes=10**9)
    for step in (0, 1, 2, 7):
        shards.put(step, keep([{"a": torch.zeros(2, 100)}], {}))  # 400 bytes
    shards.flush()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[-31:-12] for name in names] == [
        "000000000-000000001", "000000002-000000002", "000000007-000000007",
    ]  # fmt: skip
    again = Shards(tmp_path, 3, pytest.fail, shard_bytes=400)
    assert [again.get(step) is not None for step in (0, 2, 3, 7)] == [True, True, False, True]
    again.put(9, keep([{"a": torch.zeros(2, 100)}], {}))  # full at once
    assert again.get(9) is not None
    assert Shards(tmp_path, 0, pytest.fail).get(0) is None  # another process's


def test_the_shared_cache_stays_after_an_interruption_only(images, teacher, tmp_path):
    words = [*TINY, f"data.train={images}", f"teacher.backbone={teacher}", "students=a,b"]
    settings = load_settings(DistillConfig, [*words, f"run_dir={tmp_path}"], command="distill")
    folder = tmp_path / SHARED_FOLDER
    for error, stays in ((Interrupted("now"), True), (UserError("wrong"), False)):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError), shared_cache(settings):
            raise error
        assert folder.exists() == stays
    for update in ({"students": ["a"]}, {"cache": "auto"}):
        given = settings.model_copy(update=update)
        with shared_cache(given) as same:
            assert same is given


def test_a_shared_cache_beyond_the_limit_lets_the_teacher_answer(run, asked, tmp_path):
    off = run("off", cache="off")
    assert run("shared", "cache_limit=0.000001", cache=SHARED_FOLDER) == off
    assert asked == []
    assert "answers every student anew" in log_of(tmp_path / "shared")


def test_a_replaced_broken_image_is_a_different_batch(run, asked, teacher, tmp_path):
    """An image that breaks keeps size and time of change, so that only the views can tell."""
    folder = write_images(tmp_path / "own", side=24)
    run("fill", f"data.train={folder}", "optim.length=5")
    path = folder / "class_0" / "000.jpg"
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    words = [f"data.train={folder}", "optim.length=5", "data.max_broken_share=0.5"]
    read = run("read", *words)
    assert len(asked) == 6  # 5 batches of 8 are all 40 images: one of them held it
    assert read == pytest.approx(run("off", *words, cache="off"), rel=1e-3)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_keep_their_own_shards(images, teacher, tmp_path):
    words = [*TINY, f"data.train={images}", f"teacher.backbone={teacher}"]
    for name in ("fill", "read"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "-m", "dino_kd", "distill", *words]
        command += [f"cache={tmp_path / 'cache'}", f"run_dir={tmp_path / name}"]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name[:9] for path in tmp_path.glob("cache/*/*.safetensors"))
    assert names == ["rank-0000", "rank-0001"]
    assert "6 steps were read, the teacher answered 0" in log_of(tmp_path / "read")
    fill, read = ([row["loss"] for row in read_metrics(tmp_path / n)] for n in ("fill", "read"))
    assert read == fill
