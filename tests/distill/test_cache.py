"""The cache of teachers' answers: the same training with and without it, never a wrong answer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from dino_kd.config import load_settings
from dino_kd.data.mixing import Mix, Views
from dino_kd.distill.cache import keep, shared_cache, view_of
from dino_kd.distill.story import distill, prepare
from dino_kd.errors import ConfigError, Interrupted
from dino_kd.schema import DistillConfig
from dino_kd.tasks.teacher import Teacher
from tests.tiny import read_metrics

FAST = [
    "device=cpu", "data.num_workers=0", "student.backbone=test_resnet", "student.image_size=32",
    "optim.batch_size=12", "optim.length=6", "optim.precision=fp32", "optim.base_lr=0.001",
    "log.log_every=1", "log.save_every=3", "log.tensorboard=false", "recalibrate=0",
    "augment.mix_share=0.7", "terms.relation_kd.weight=1", "terms.attention_kd.weight=1",
    "terms.attention_kd.strides=[8]", "terms.attention_kd.teacher_map=attention",
]  # fmt: skip


def settings(images, teacher, run_dir, *more):
    base = [*FAST, f"data.train={images}", f"teacher.backbone={teacher}", f"run_dir={run_dir}"]
    given = {word.split("=")[0] for word in more}
    words = [word for word in base if word.split("=")[0] not in given] + list(more)
    return load_settings(DistillConfig, words, command="distill")


def losses(run_dir):
    return [row["loss"] for row in read_metrics(run_dir)]


@pytest.fixture
def asked(monkeypatch):
    """How often a teacher was asked since the last `clear`."""
    calls: list[tuple[str, ...]] = []
    real = Teacher.answers

    def spy(self, pixels, names):
        calls.append(tuple(names))
        return real(self, pixels, names)

    monkeypatch.setattr(Teacher, "answers", spy)
    return calls


def test_off_filling_and_reading_train_alike(images, tuned, tmp_path, asked):
    cache = f"cache={tmp_path / 'cache'}"
    runs = [tmp_path / name for name in ("off", "fill", "read")]
    distill(settings(images, tuned, runs[0]))
    distill(settings(images, tuned, runs[1], cache))
    asked.clear()
    distill(settings(images, tuned, runs[2], cache))
    off, fill, read = (losses(run) for run in runs)
    assert read == fill  # bit for bit
    assert fill == pytest.approx(off, rel=1e-3)
    assert fill != off  # fp16, or nothing was cached at all
    # one black image tells the size, one batch of them the scales; no training batch is asked
    assert len(asked) == 2
    assert "6 steps were read, the teacher answered 0" in (runs[2] / "train.log").read_text()
    (entry,) = (tmp_path / "cache").iterdir()
    kept = sum(path.stat().st_size for path in entry.glob("*.safetensors"))
    with safe_open(min(entry.glob("*.safetensors")), "pt") as file:
        assert file.get_tensor("0/0/logits").dtype == torch.float16
        assert json.loads(file.metadata()["about"])["rank"] == 0
    assert kept < 6 * 12 * 40_000


def test_another_student_loss_and_length_read_the_same_answers(images, tuned, tmp_path, asked):
    cache = f"cache={tmp_path / 'cache'}"
    distill(settings(images, tuned, tmp_path / "one", cache))
    asked.clear()
    distill(
        settings(
            images, tuned, tmp_path / "two", cache, "student.backbone=test_vit",
            "student.args={patch_size: 8}", "terms.logit_kd.weight=1", "optim.name=sgd",
            "optim.length=8", "optim.accumulate=2",
            "terms.attention_kd.strides=[8]",
        )
    )  # fmt: skip
    assert "6 steps were read, the teacher answered 2" in (tmp_path / "two/train.log").read_text()


def test_a_resumed_run_reads_what_was_flushed(images, tuned, tmp_path, monkeypatch):
    cache = f"cache={tmp_path / 'cache'}"
    distill(settings(images, tuned, tmp_path / "whole", cache))
    reference = losses(tmp_path / "whole")
    from dino_kd.engine import loop

    real = loop.Progress.count

    def count(self, done, loss, is_finite):
        real(self, done, loss, is_finite)
        if done == 4:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "count", count)
    other = f"cache={tmp_path / 'other'}"
    with pytest.raises(Interrupted):
        distill(settings(images, tuned, tmp_path / "cut", other))
    monkeypatch.setattr(loop.Progress, "count", real)
    distill(settings(images, tuned, tmp_path / "cut", other, "resume=true"))
    assert losses(tmp_path / "cut") == reference
    again = tmp_path / "again"
    distill(settings(images, tuned, again, other))
    assert "6 steps were read" in (again / "train.log").read_text()


def test_an_entry_larger_than_the_limit_is_refused_before_the_first_step(images, tuned, tmp_path):
    with pytest.raises(ConfigError, match=r"the teacher's answers take .* cache_limit=1e-06"):
        distill(settings(images, tuned, tmp_path / "run", f"cache={tmp_path / 'c'}",
                         "cache_limit=1e-6"))  # fmt: skip
    assert "step 1/" not in (tmp_path / "run" / "train.log").read_text()


def test_several_students_share_one_pass_of_the_teacher(images, tuned, tmp_path, asked):
    whole = settings(images, tuned, tmp_path / "run", "students=test_resnet,test_efficientnet")
    with shared_cache(whole) as shared:
        folder = tmp_path / "run" / "teacher_cache"
        for name in whole.students:
            asked.clear()
            network = shared.student.model_copy(update={"backbone": name})
            run_dir = str(tmp_path / "run" / name)
            distill(shared.model_copy(update={"student": network, "run_dir": run_dir}))
            assert folder.is_dir()
    assert len(asked) == 2  # as when everything is read: see above
    assert not folder.exists()
    alone = settings(images, tuned, tmp_path / "x")
    with shared_cache(alone) as same:
        assert same is alone


def test_a_view_is_its_pixels_its_images_and_its_mix():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    labels = torch.zeros(2, dtype=torch.int64)

    def view(pixels=images, indices=(0, 1), mix=None):
        return view_of(Views(pixels, labels, torch.tensor(indices), mix))

    changed = images.clone()
    changed[1, 2, 3, 3] ^= 1
    others = [view(changed), view(indices=(0, 2)), view(mix=Mix(0.5)), view(mix=Mix(0.6)),
              view(mix=Mix(0.5, (0, 0, 1, 1)))]  # fmt: skip
    for number, one in enumerate(others):
        assert one != view()
        assert all(one != other for other in others[:number])
    assert json.loads(json.dumps(view())) == view()


def test_a_file_in_the_place_of_the_folder_is_refused(images, tuned, tmp_path):
    (tmp_path / "c").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        distill(settings(images, tuned, tmp_path / "run", f"cache={tmp_path / 'c'}"))
    prepare(settings(images, tuned, tmp_path / "run"), torch.device("cpu"))


def test_answers_are_kept_in_the_layout_that_a_file_gives_back():
    maps = torch.randn(2, 9, 4).transpose(1, 2).unflatten(2, (3, 3))
    assert not maps.is_contiguous()
    assert keep([{"map": maps}], {}).restored()[0]["map"].is_contiguous()
