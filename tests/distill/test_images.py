"""Which images of a distillation have labels, which are trained on, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from dino_kd.config import load_settings
from dino_kd.data.specs import make_dataset
from dino_kd.distill.images import open_images
from dino_kd.errors import ConfigError, DataError
from dino_kd.schema import DistillConfig, FinetuneConfig
from eval import labelled
from tests.tiny import write_images


def settings(images, run_dir, *words):
    base = [f"data.train={images}", f"run_dir={run_dir}", "teacher.backbone=z"]
    return load_settings(DistillConfig, [*base, *words], command="distill")


def unlabelled(images, folder):
    folder.mkdir()
    for path in sorted(images.glob("*/*.jpg"))[:8]:
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
    return folder


@pytest.mark.parametrize("seed", [0, 5])
def test_labels_are_those_that_fine_tuning_with_the_same_seed_uses(images, tmp_path, seed):
    opened = open_images(
        settings(images, tmp_path / "run", "data.labels=0.25", f"data.label_seed={seed}", "seed=3"),
        labels_for=["ce"],
    )
    words = [f"train={images}", f"test={images}", f"run_dir={tmp_path}/ft", "backbone=z"]
    words += ["fraction=0.25", f"seed={seed}"]
    tuned = labelled.open_labelled_sets(load_settings(FinetuneConfig, words, command="finetune"), 3)
    whole = make_dataset(str(images), channels=3)
    used = np.flatnonzero(opened.labels >= 0)
    # the same pictures, by their pixels
    assert len(used) == len(tuned.train) == 9
    for index, position in enumerate(used):
        assert np.array_equal(whole.read(position), tuned.train.read(index))
    assert torch.equal(opened.labels[used], tuned.train_labels)
    assert opened.labelled_share == 0.25
    assert opened.class_names == ["class_0", "class_1", "class_2"]
    assert len(opened.train) == 36


def test_labels_alone_train_on_the_labelled_images_alone(images, tmp_path):
    given = settings(images, tmp_path / "run", "data.labels=0.25")
    opened = open_images(given, labels_for=["ce"], only_labelled=True)
    assert len(opened.train) == len(opened.labels) == 9
    assert opened.labelled_share == 1.0
    whole = make_dataset(str(images), channels=3)
    for index, label in enumerate(opened.labels.tolist()):
        pixels = opened.train.read(index)
        matches = [i for i in range(36) if np.array_equal(whole.read(i), pixels)]
        assert [whole.labels[i] for i in matches] == [label]


@pytest.mark.parametrize("words", [[], ["data.labels=0"], ["data.labels=0.5"]], ids=str)
def test_no_label_is_used_when_no_term_reads_them(images, tmp_path, words):
    opened = open_images(settings(images, tmp_path / "run", *words), labels_for=[])
    assert (opened.labels == -1).all()
    assert opened.class_names is None
    assert opened.labelled_share == 0


def test_images_without_labels_do_for_a_teacher_alone(images, tmp_path):
    folder = unlabelled(images, tmp_path / "flat")
    opened = open_images(settings(folder, tmp_path / "run"), labels_for=[])
    assert len(opened.train) == 8
    with pytest.raises(DataError, match=r"has no labels .*terms.ce needs them.*label_free"):
        open_images(settings(folder, tmp_path / "run"), labels_for=["ce"])


def test_no_labels_wanted_where_a_term_needs_them(images, tmp_path):
    with pytest.raises(DataError, match=r"data.labels=0, but terms.dkd needs labels"):
        open_images(settings(images, tmp_path / "run", "data.labels=0"), labels_for=["dkd"])


def test_the_test_set_is_scored_in_the_classes_of_the_training_set(images, tmp_path):
    other = write_images(tmp_path / "test", 6, classes=2)
    (other / "class_0").rename(other / "class_2")
    opened = open_images(
        settings(images, tmp_path / "run", f"data.test={other}"), labels_for=["ce"]
    )
    assert sorted(opened.test_labels.tolist()) == [1, 1, 1, 2, 2, 2]
    (other / "class_1").rename(other / "cat")
    with pytest.raises(DataError, match=r"data.test: .*the training images lack: cat"):
        open_images(settings(images, tmp_path / "run", f"data.test={other}"), labels_for=["ce"])


def test_a_run_inside_the_images_and_images_that_are_not_there_are_refused(images, tmp_path):
    with pytest.raises(ConfigError, match=r"run_dir: .* lies inside the training folder"):
        open_images(settings(images, images / "run"), labels_for=[])
    with pytest.raises(DataError, match=r"data.train: .*nowhere"):
        open_images(settings(tmp_path / "nowhere", tmp_path / "run"), labels_for=[])


def test_a_range_of_crops_must_ascend():
    """As for every other command."""
    words = ["data.train=x", "teacher.backbone=x", "run_dir=x", "augment.scale=[1.0,0.25]"]
    with pytest.raises(ConfigError, match="the first number must not exceed the second"):
        load_settings(DistillConfig, words, command="distill")
