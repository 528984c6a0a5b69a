"""The k-NN command with few images per class, with each image left out, against scikit-learn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dino_kd.config import load_settings
from dino_kd.data.specs import make_dataset
from dino_kd.errors import ConfigError, DataError
from dino_kd.features import extract_features, pixel_features
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import load_backbone, save_backbone
from dino_kd.schema import KnnConfig
from eval import knn
from tests.eval.test_knn import QUIET, REPOSITORY, TINY


def write_hard_images(root, per_class, seed):
    """Three classes whose colours differ little against the noise."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            colour = np.where(np.arange(3) == c, 128, 120)
            pixels = rng.normal(colour, 20, (16, 16, 3)) + rng.normal(0, 6, 3)
            pixels = pixels.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def sets(tmp_path):
    return (
        write_hard_images(tmp_path / "train", 12, seed=0),
        write_hard_images(tmp_path / "test", 7, seed=1),
    )


def run(tmp_path, *words):
    output = tmp_path / "result.json"
    assert knn.main([*words, *QUIET, f"output={output}"]) == 0
    return json.loads(output.read_text())


def neighbours(k):
    return KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )


def test_features_of_a_network_score_as_in_scikit_learn(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=TINY)
    save_backbone(backbone, tmp_path / "backbone")
    train = write_hard_images(tmp_path / "train", 40, seed=0)
    test = write_hard_images(tmp_path / "test", 40, seed=1)
    result = run(
        tmp_path, f"backbone={tmp_path / 'backbone'}", f"train={train}", f"test={test}",
        "k=[1, 5, 20]",
    )  # fmt: skip
    bank, queries = (
        extract_features(load_backbone(tmp_path / "backbone"), make_dataset(str(s)), size=16)
        for s in (train, test)
    )
    for k in (1, 5, 20):
        reference = neighbours(k).fit(bank.features.numpy(), bank.labels.numpy())
        expected = 100 * reference.score(queries.features.numpy(), queries.labels.numpy())
        assert 40 < expected < 100
        assert result["metrics"][f"knn{k}_top1"] == pytest.approx(expected, abs=0.2)


def test_each_image_is_scored_by_the_others_as_in_scikit_learn(sets, tmp_path, capsys):
    """36 fits without one image each; exact copies of an image stay among its neighbours."""
    for i in (0, 1):
        (sets[0] / "ant" / f"copy{i}.png").write_bytes((sets[0] / "bee" / "3.png").read_bytes())
    result = run(
        tmp_path, "backbone=pixels", f"train={sets[0]}", "leave_one_out=true", "k=[1, 5, 60]"
    )
    bank = pixel_features(make_dataset(str(sets[0])), size=32)
    x, y = bank.features.numpy(), bank.labels.numpy()
    for k in (5, 37):
        hits = [
            neighbours(k).fit(np.delete(x, i, 0), np.delete(y, i)).predict(x[i : i + 1])[0] == y[i]
            for i in range(38)
        ]
        name = {5: "knn5_top1", 37: "knn60_top1"}[k]
        assert result["metrics"][name] == pytest.approx(100 * np.mean(hits))
    assert result["protocol"]["leave_one_out"] is True
    assert result["protocol"]["clamped_to"] == {"60": 37}
    assert list(result["data"]) == ["train"]
    assert "38 images, each scored by the others, 3 classes" in capsys.readouterr().out
    assert knn.headline(result)[0][0] == "k-NN top-1 %, k = 5, leave one out"


def test_a_class_of_one_image_is_noted_when_it_is_left_out(sets, tmp_path):
    (sets[0] / "dog").mkdir()
    (sets[0] / "dog" / "0.png").write_bytes((sets[0] / "bee" / "3.png").read_bytes())
    result = run(tmp_path, "backbone=pixels", f"train={sets[0]}", "leave_one_out=true", "k=1")
    assert result["notes"] == ["1 classes have one image, which is never right: dog"]


def test_few_images_per_class_vote_in_every_draw(sets, tmp_path, capsys):
    """Mean and standard deviation of single draws with seeds 3, 4, 5."""
    words = ["backbone=pixels", f"train={sets[0]}", f"test={sets[1]}", "k=[1, 5]", "per_class=2"]
    whole = run(tmp_path, *words, "draws=3", "seed=3")
    capsys.readouterr()
    single = [run(tmp_path, *words, "draws=1", f"seed={seed}") for seed in (3, 4, 5)]
    values = [one["metrics"]["knn1_top1"] for one in single]
    assert len(set(values)) > 1
    assert whole["metrics"]["knn1_top1"] == pytest.approx(statistics.fmean(values))
    assert whole["metrics"]["knn1_top1_sd"] == pytest.approx(statistics.stdev(values))
    assert single[0]["metrics"]["knn1_top1_sd"] is None
    assert whole["protocol"]["seeds"] == [3, 5]
    assert knn.headline(whole)[0][0] == "k-NN top-1 %, k = 5, 2 per class"
    assert "(sd " in knn.headline(whole)[0][1]
    assert "(sd " not in knn.headline(single[0])[0][1]
    printed = capsys.readouterr().out
    assert "21 test images, 2 per class of 36 vote, draws: 1, 3 classes" in printed


def test_a_draw_holds_so_many_of_each_class():
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 9)
    settings = knn.KnnConfig(backbone="x", train="x", test="x", per_class=3, draws=4)
    drawn = list(knn.drawn_rows(labels, settings))
    assert len({tuple(rows.tolist()) for rows in drawn}) > 1
    for rows in drawn:
        assert torch.bincount(labels[rows]).tolist() == [3, 3, 3]
        assert len(set(rows.tolist())) == 9


def test_all_images_of_each_class_give_the_whole_score(sets, tmp_path):
    words = ["backbone=pixels", f"train={sets[0]}", f"test={sets[1]}", "k=[5]"]
    every = run(tmp_path, *words, "per_class=12", "draws=2")["metrics"]
    whole = run(tmp_path, *words)["metrics"]
    assert every["knn5_top1"] == whole["knn5_top1"]
    assert every["knn5_top1_sd"] == 0


def test_a_class_with_too_few_images_is_named(sets, tmp_path):
    words = ["backbone=pixels", f"train={sets[0]}", f"test={sets[1]}", *QUIET]
    (sets[0] / "bee" / "0.png").unlink()
    with pytest.raises(DataError, match=r"per_class: 12 images.*'bee' has 11 images in train; use"):
        knn.main([*words, "per_class=12"])
    (sets[0] / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"per_class: 12 .*'bee' has 11 images in train; use"):
        knn.main([*words, "per_class=12"])
    (sets[0] / "bee" / "1.png").write_bytes(b"broken")
    with pytest.raises(
        DataError, match=r"'bee' has 10 readable images in train; use .* at most 10"
    ):
        knn.main([*words, "per_class=11"])
    with pytest.raises(DataError, match=r"'bee' has 11 .*, and 2 more of the classes have too few"):
        knn.main([*words, "per_class=13"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "test: required, and not given.*leave_one_out=true"),
        (["test=t", "leave_one_out=true"], "test: .*test=t was given too.*leave out one"),
        (["leave_one_out=true", "per_class=3"], "per_class: 3 images.*leave_one_out=true has none"),
        (["test=t", "per_class=3", "labels=l.csv"], "per_class: 3 .*labels=l.csv gives several"),
        (["test=t", "per_class=0"], "per_class"),
        (["test=t", "draws=0"], "draws"),
        (["test=t", "seed=-1"], "seed"),
    ],
)
def test_modes_that_exclude_each_other(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        knn.main(["backbone=pixels", "train=x", *words, *QUIET])


def test_one_image_cannot_be_left_out(sets):
    for path in sorted(sets[0].rglob("*.png"))[1:]:
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"train: .* has 1 readable image"):
        knn.main(["backbone=pixels", f"train={sets[0]}", "leave_one_out=true", *QUIET])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("mode", [["leave_one_out=true"], ["per_class=4", "draws=3"]])
def test_two_processes_give_the_numbers_of_one(sets, tmp_path, mode):
    (sets[0] / "cat" / "6.png").write_bytes(b"broken")
    test = [] if mode[0].startswith("leave") else [f"test={sets[1]}"]
    words = ["backbone=pixels", f"train={sets[0]}", *test, *mode, "batch_size=4"]
    one = run(tmp_path, *words)
    output = tmp_path / "two.json"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "eval.knn", *words, *QUIET, f"output={output}"],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )  # fmt: skip
    two = json.loads(output.read_text())
    assert two["metrics"] == one["metrics"]
    assert two["data"] == one["data"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "knn"),
        (["per_class=3"], "knn_per_class3"),
        (["labels=l.csv"], "knn_labels"),
    ],
)
def test_each_protocol_has_a_file_of_its_own(words, name):
    argv = ["backbone=pixels", "train=a", "test=b", *words]
    assert knn.result_name(load_settings(KnnConfig, argv, command="knn")) == name


def test_leave_one_out_has_a_file_of_its_own():
    argv = ["backbone=pixels", "train=a", "leave_one_out=true"]
    settings = load_settings(KnnConfig, argv, command="knn")
    assert knn.result_name(settings) == "knn_leave_one_out"
