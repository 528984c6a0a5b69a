"""The duplicates command on folders with planted copies: pairs, leakage, files, mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dino_kd.config import load_settings
from dino_kd.data.specs import make_dataset
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.pretrained import load_backbone, save_backbone
from dino_kd.schema import DuplicatesConfig
from eval import duplicates
from tests.eval.tiny_sets import QUIET, picture, write_backbone, write_set

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def sets(tmp_path):
    """Train: 8 pictures of 2 classes, and copies. Test: 4 of its own, 3 that train holds too."""
    train = write_set(tmp_path / "train", 8, classes=("ant", "bee"))
    test = write_set(tmp_path / "test", 4, seed=1, classes=("ant", "bee"))
    shutil.copy(train / "ant" / "000.png", train / "ant" / "copy.png")  # equal bytes
    picture(2).save(train / "bee" / "other.bmp")  # equal pixels, another class
    picture(4).resize((96, 96), Image.Resampling.BICUBIC).save(train / "ant" / "large.png")
    picture(1).save(test / "bee" / "leak.jpg", quality=70)
    picture(3).save(test / "ant" / "leak.png")  # in train it is a bee
    picture(0).save(test / "ant" / "twice.png")
    return train, test


def run(tmp_path, *words):
    output = tmp_path / "dup.json"
    assert duplicates.main([*words, *QUIET, f"output={output}"]) == 0
    return json.loads(output.read_text())


def names(group):
    return {f"{image['set']}/{Path(image['path']).stem}" for image in group}


@pytest.mark.parametrize("source", ["pixels", "network"])
def test_planted_copies_are_found_and_nothing_else(sets, tmp_path, source, capsys):
    backbone = "pixels" if source == "pixels" else write_backbone(tmp_path / "backbone")
    result = run(
        tmp_path, f"backbone={backbone}", f"train={sets[0]}", f"test={sets[1]}", "threshold=0.1"
    )
    assert {frozenset(names(group)) for group in result["groups"]} == {
        frozenset({"train/000", "train/copy", "test/twice"}),
        frozenset({"train/002", "train/other"}),
        frozenset({"train/004", "train/large"}),
        frozenset({"train/001", "test/leak"}),
        frozenset({"train/003", "test/leak"}),
    }
    expected = {
        "exact_images": 7, "exact_pairs": 4, "near_pairs": 2, "groups": 5, "largest_group": 3,
        "train_extra": 3, "train_kept": 5, "train_images": 11, "conflicts": 2,
        "leaked": 3, "leaked_exact": 2, "leaked_same_class": 2,
    }  # fmt: skip
    assert result["metrics"] == expected
    printed = capsys.readouterr().out
    assert (
        "3  test images (42.86 %) have a duplicate in train, 2 of them pixel for pixel" in printed
    )
    assert "2  of those have the class of that duplicate, 1 another one" in printed


def test_files_beside_the_result(sets, tmp_path):
    run(tmp_path, "backbone=pixels", f"train={sets[0]}", f"test={sets[1]}", "threshold=0.1")
    rows = list(csv.DictReader((tmp_path / "dup.pairs.csv").open()))
    assert len(rows) == 6
    near = {frozenset({Path(r["path_a"]).stem, Path(r["path_b"]).stem}): r for r in rows}
    row = near[frozenset({"004", "large"})]
    assert row["kind"] == "near"
    assert float(row["appearance"]) > 0.75
    assert float(row["cosine"]) > 0.9
    conflict = near[frozenset({"002", "other"})]
    assert (conflict["kind"], conflict["class_a"], conflict["class_b"]) == ("exact", "ant", "bee")
    assert int(conflict["group"]) <= 2  # conflicting classes come first
    kept = {Path(line).name for line in (tmp_path / "dup.keep.txt").read_text().splitlines()}
    # one of each group, the larger picture, else the first; nothing that test holds too
    assert kept == {"002.png", "large.png", "005.png", "006.png", "007.png"}
    with Image.open(tmp_path / "dup.png") as sheet:
        assert sheet.height > 5 * 128


def test_the_list_of_images_to_keep_is_a_clean_data_set(sets, tmp_path):
    run(tmp_path, "backbone=pixels", f"train={sets[0]}", f"test={sets[1]}", "threshold=0.1")
    keep = tmp_path / "dup.keep.txt"
    assert len(make_dataset(str(keep))) == 5
    again = run(tmp_path, "backbone=pixels", f"train={keep}", f"test={sets[1]}", "threshold=0.1")
    assert again["metrics"]["groups"] == 0
    assert again["metrics"]["leaked"] == 0
    assert again["metrics"]["conflicts"] is None  # a list has no labels


def test_without_appearance_the_cosine_decides(sets, tmp_path):
    """All pairs above a low threshold, against a loop over the features."""
    words = ["backbone=pixels", f"train={sets[1]}", "appearance=0", "threshold=0.85"]
    result = run(tmp_path, *words, "image_size=4")
    from dino_kd.features import pixel_features

    f = pixel_features(make_dataset(str(sets[1])), size=4).features.double()
    cosine = torch.nn.functional.cosine_similarity(f[:, None], f[None], dim=-1)
    near = sum(cosine[i, j] >= 0.85 for i in range(7) for j in range(i))
    assert result["metrics"]["near_pairs"] == near > 0
    assert "the cosine decides alone" in str(result["notes"])
    few = run(tmp_path, *words, "image_size=4", "neighbours=1")
    assert few["metrics"]["near_pairs"] <= near


def test_images_without_files_have_no_list_to_keep(tmp_path):
    result = run(tmp_path, "backbone=pixels", "train=synthetic:textures:test:30")
    assert "no list of images to keep" in str(result["notes"])
    assert not (tmp_path / "dup.keep.txt").exists()


def test_a_single_image_has_no_duplicates(tmp_path):
    one = write_set(tmp_path / "one", 1)
    result = run(tmp_path, "backbone=pixels", f"train={one}")
    assert result["metrics"]["groups"] == 0
    assert result["metrics"]["train_kept"] == 1


def test_mistakes_are_named(sets, tmp_path):
    with pytest.raises(DataError, match=r"test: .*nowhere does not exist"):
        run(tmp_path, "backbone=pixels", f"train={sets[0]}", f"test={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"train: .* is an empty folder"):
        run(tmp_path, "backbone=pixels", f"train={tmp_path / 'empty'}")
    with pytest.raises(ConfigError, match="threshold"):
        run(tmp_path, "backbone=pixels", f"train={sets[0]}", "threshold=1.5")
    backbone = load_backbone(write_backbone(tmp_path / "backbone"))
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match="not finite on the train images"):
        run(tmp_path, f"backbone={tmp_path / 'nan'}", f"train={sets[0]}")


def test_the_packaged_config_holds_the_defaults():
    words = ["backbone=x", "train=y"]
    packaged = load_settings(DuplicatesConfig, ["eval/duplicates", *words], command="duplicates")
    assert packaged == load_settings(DuplicatesConfig, words, command="duplicates")


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_find_what_one_finds(sets, tmp_path):
    (sets[0] / "bee" / "005.png").write_bytes(b"broken")
    words = ["backbone=pixels", f"train={sets[0]}", f"test={sets[1]}", "batch_size=3"]
    one = run(tmp_path, *words)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = tmp_path / "two.json"
    subprocess.run(
        [*launcher, "--nproc_per_node=2", "-m", "eval.duplicates", *words, *QUIET,
         f"output={output}"],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )  # fmt: skip
    two = json.loads(output.read_text())
    assert (two["metrics"], two["groups"], two["data"]) == (
        one["metrics"], one["groups"], one["data"]
    )  # fmt: skip
    files = [tmp_path / f"{name}.pairs.csv" for name in ("dup", "two")]
    assert files[0].read_text() == files[1].read_text()
