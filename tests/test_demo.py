"""The demo tells the truth: its numbers are those of the evaluator, its pictures exist."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dino_kd import cli
from dino_kd.config import dump_settings
from dino_kd.demo import BANK, QUERIES
from dino_kd.schema import PretrainConfig


@pytest.mark.slow
def test_a_shortened_demo_prints_saves_and_draws(tmp_path, capsys):
    run_dir = tmp_path / "demo"
    assert cli.main(["demo", f"run_dir={run_dir}", "optim.length=20", "data.num_workers=0"]) == 0
    shown = capsys.readouterr().out
    numbers = json.loads((run_dir / "eval" / "demo.json").read_text())
    for row in ("chance", "raw pixels", "untrained network", "pretrained network"):
        assert row in shown
    assert numbers["chance_top1"] == 12.5
    for name in ("crops.png", "attention.png"):
        assert min(Image.open(run_dir / name).size) > 300
    for branch, name in (("teacher", "pretrained"), ("untrained", "untrained")):
        words = [f"backbone={run_dir}", f"branch={branch}", "k=[20]"]
        words += [f"train=synthetic:{BANK}", f"test=synthetic:{QUERIES}", "num_workers=0"]
        assert cli.main(["knn", *words]) == 0
        result = json.loads((run_dir / "eval" / f"knn_{branch}.json").read_text())
        assert result["metrics"]["knn20_top1"] == pytest.approx(
            numbers[f"{name}_network_knn20_top1"]
        )


def test_the_demo_refuses_other_images(tmp_path, capsys):
    assert cli.main(["demo", f"run_dir={tmp_path}/x", "data.train=/some/photos"]) == 2
    assert "use dino-kd pretrain" in capsys.readouterr().err


def test_another_run_in_its_folder_is_not_replaced(tmp_path, monkeypatch, capsys):
    """A pretraining of own pictures, and a run of another command."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "demo"
    run_dir.mkdir(parents=True)
    own = PretrainConfig(run_dir=str(run_dir), data={"train": "/my/photos"})
    for text in (dump_settings(own), "backbone: x\nrun_dir: y\n"):
        (run_dir / "config.yaml").write_text(text)
        assert cli.main(["demo"]) == 2
        assert "runs/demo holds a run that is no demo" in capsys.readouterr().err
        assert (run_dir / "config.yaml").read_text() == text


def test_help_says_what_can_be_set(capsys):
    assert cli.main(["demo", "--help"]) == 0
    assert "seed=1" in capsys.readouterr().out
