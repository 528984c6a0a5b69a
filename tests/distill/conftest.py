"""What a teacher can be opened from, each made once by the command that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_kd.config import load_settings
from dino_kd.pretrain import pretrain
from dino_kd.schema import PretrainConfig
from eval import finetune, linear
from tests.tiny import TINY, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """36 noisy pictures of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), 36, classes=3)


@pytest.fixture(scope="session")
def pretrained(images, tmp_path_factory) -> Path:
    """A run of `dino-kd pretrain` with a linear head in its eval folder."""
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    words = [*TINY, "optim.length=2", "model.args={depth: 2, embed_dim: 32, num_heads: 2}"]
    words += [f"data.train={images}", f"run_dir={run_dir}"]
    pretrain(load_settings(PretrainConfig, words, command="pretrain"))
    linear.main([
        f"backbone={run_dir}", f"train={images}", f"test={images}", "device=cpu", "num_workers=0",
        "cache=off", "epochs=2", "train_batch=8", "held_out=0.3", "learning_rates=[0.1]",
    ])  # fmt: skip
    return run_dir


@pytest.fixture(scope="session")
def tuned(pretrained, images, tmp_path_factory) -> Path:
    """A run of `dino-kd finetune` from it."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    finetune.main([
        f"backbone={pretrained}", f"train={images}", f"test={images}", f"run_dir={run_dir}",
        "device=cpu", "num_workers=0", "optim.batch_size=12", "optim.length=2",
        "optim.precision=fp32", "log.tensorboard=false",
    ])  # fmt: skip
    return run_dir
