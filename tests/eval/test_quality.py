"""The quality command: numbers are those of the library, verdicts in words, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_kd.config import load_settings
from dino_kd.data.multicrop import CropPolicy, crop_rng, render_crops, sample_crops
from dino_kd.data.specs import make_dataset
from dino_kd.data.views import ViewedImages
from dino_kd.errors import CheckpointError, DataError
from dino_kd.features import extract_features
from dino_kd.metrics import spectrum
from dino_kd.pretrained import load_backbone, save_backbone
from dino_kd.schema import QualityConfig
from eval import quality
from tests.eval.tiny_sets import QUIET, write_backbone, write_set

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def images(tmp_path):
    return write_set(tmp_path / "images", 12)


@pytest.fixture
def folder(tmp_path):
    return write_backbone(tmp_path / "backbone")


def run(backbone, images, tmp_path, *more):
    output = tmp_path / "quality.json"
    words = [f"backbone={backbone}", f"data={images}", *QUIET, f"output={output}", *more]
    assert quality.main(words) == 0
    return json.loads(output.read_text())


def test_numbers_are_those_of_the_library(images, folder, tmp_path, capsys):
    """Views rendered here, one by one, through the network without the evaluator."""
    result = run(folder, images, tmp_path, "views=3", "view_images=5", "seed=7")
    backbone, dataset = load_backbone(folder), make_dataset(str(images))
    bank = extract_features(backbone, dataset, size=16).features
    views = []
    for position in range(5):
        pixels = dataset.read(position * 12 // 5)
        made = []
        for pair in range(2):
            params = sample_crops(
                CropPolicy(global_size=(16, 16), num_local_crops=0),
                *pixels.shape[:2],
                crop_rng(7, pair, position),
            )
            made += render_crops(pixels, params)
        batch = torch.from_numpy(np.stack(made[:3]))
        with torch.no_grad():
            views.append(backbone.eval()(backbone.preprocess(batch)))
    views = torch.stack(views)
    assert result["metrics"]["rankme"] == pytest.approx(spectrum.rankme(bank), rel=1e-5)
    assert result["metrics"]["uniformity"] == pytest.approx(spectrum.uniformity(bank), rel=1e-4)
    assert result["metrics"]["alignment"] == pytest.approx(spectrum.alignment(views), rel=1e-4)
    assert result["metrics"]["lidar"] == pytest.approx(spectrum.lidar(views), rel=1e-4)
    assert result["protocol"]["view_images"] == 5
    printed = capsys.readouterr().out
    assert f"{result['metrics']['rankme']:10.2f}" in printed
    assert "verdict: " in printed
    assert "12 images cannot show all 32 dimensions" in printed


def test_views_do_not_depend_on_how_many_are_asked_for(images):
    dataset = make_dataset(str(images))
    few, many = (
        ViewedImages(dataset, [4, 9], CropPolicy(global_size=(8, 8)), num_views=n, seed=0)
        for n in (3, 6)
    )
    assert len(few) == 6
    for image in range(2):
        for view in range(3):
            assert (few.read(3 * image + view) == many.read(6 * image + view)).all()
    assert (few.read(0) != few.read(1)).any()
    other = ViewedImages(dataset, [4, 9], CropPolicy(global_size=(8, 8)), num_views=3, seed=1)
    assert (few.read(0) != other.read(0)).any()
    assert few.fingerprint() != other.fingerprint()


def test_a_collapsed_network_is_called_collapsed(images, folder, tmp_path, capsys):
    backbone = load_backbone(folder)
    torch.nn.init.zeros_(backbone.net.norm.weight)
    torch.nn.init.ones_(backbone.net.norm.bias)
    save_backbone(backbone, tmp_path / "flat")
    result = run(tmp_path / "flat", images, tmp_path)
    assert all(np.isfinite(v) for v in result["metrics"].values())
    assert result["metrics"]["rankme"] == pytest.approx(1, abs=1e-3)
    assert result["metrics"]["alignment"] == pytest.approx(0, abs=1e-9)
    assert "verdict: collapsed: every image gets the same feature" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rank", "dead", "word"),
    [(1.4, 0.0, "nearly collapsed"), (3.0, 0.0, "narrow"), (90.0, 0.6, "narrow"),
     (90.0, 0.0, "no collapse")],
)  # fmt: skip
def test_verdicts(rank, dead, word):
    metrics = {"effective_rank": rank, "dead_dimensions": dead, "feature_std": 0.02}
    assert quality.verdict(metrics, torch.Size((4000, 512))).startswith(word)


def test_images_are_spread_over_the_set(images):
    found = quality.spread(make_dataset(str(images)), 4)
    assert [Path(found.path(i)).stem for i in range(4)] == ["000", "003", "006", "009"]


def test_a_broken_image_loses_all_its_views(images, folder, tmp_path):
    (images / "003.png").write_bytes(b"broken")
    result = run(folder, images, tmp_path, "views=2")
    assert result["data"]["data"]["broken"] == 1
    assert result["protocol"]["view_images"] == 11


def test_mistakes_are_named(images, folder, tmp_path):
    one = write_set(tmp_path / "one", 1)
    with pytest.raises(DataError, match=r"has 1 image that can be read.*at least 2"):
        run(folder, one, tmp_path)
    (write_set(tmp_path / "two", 2) / "000.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"has 1 image that can be read"):
        run(folder, tmp_path / "two", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty folder"):
        run(folder, tmp_path / "empty", tmp_path)
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match="not finite on the data images"):
        run(tmp_path / "nan", images, tmp_path)
    with pytest.raises(Exception, match="views"):
        run(folder, images, tmp_path, "views=1")


def test_the_packaged_config_fits():
    words = ["eval/quality", "backbone=x", "data=y"]
    assert load_settings(QualityConfig, words, command="quality").views == 10


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(images, folder, tmp_path):
    (images / "005.png").write_bytes(b"broken")
    one = run(folder, images, tmp_path, "views=3", "batch_size=4")
    output = tmp_path / "two.json"
    words = [f"backbone={folder}", f"data={images}", *QUIET, f"output={output}", "views=3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc_per_node=2", "-m", "eval.quality", *words, "batch_size=4"],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )  # fmt: skip
    two = json.loads(output.read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert two["protocol"] == one["protocol"]
    assert two["processes"] == 2
