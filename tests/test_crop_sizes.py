"""A curriculum in a real run: resume, two processes, position embeddings, k-NN, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_kd import cli
from dino_kd.config import load_settings
from dino_kd.engine.checkpoint import load_checkpoint
from dino_kd.engine.hooks import KnnMonitor
from dino_kd.errors import Interrupted
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrain import pretrain
from dino_kd.schema import PretrainConfig
from dino_kd.tasks.dino import DinoTask
from tests.tiny import TINY, draw, read_metrics, without_times, write_images

SMALL_FIRST = [*TINY, "curriculum.scale=0.5", "curriculum.length=4", "model.drop_path=0"]
CNN = ["model.backbone=resnet10t", "model.patch_size=null", "model.args={}"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def settings(images, run_dir, *more):
    given = {w.split("=")[0] for w in more}
    words = [w for w in SMALL_FIRST if w.split("=")[0] not in given]
    words += [f"data.train={images}", f"run_dir={run_dir}", *more]
    return load_settings(PretrainConfig, words, command="pretrain")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """8 steps: 16 and 8 px until step 4, then 32 and 16 px."""
    return pretrain(settings(images, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def shapes(monkeypatch):
    """Sides of the global and the local crops of every training step."""
    seen = []
    real = DinoTask.forward

    def forward(self, crops, values):
        seen.append((crops.global_crops.shape[-1], crops.local_crops.shape[-1]))
        return real(self, crops, values)

    monkeypatch.setattr(DinoTask, "forward", forward)
    return seen


def state(run_dir):
    return load_checkpoint(run_dir / "checkpoints")[0]


@pytest.mark.parametrize(("stop_after", "rest"), [(3, [16] + [32] * 4), (4, [32] * 4)])
def test_resume_around_the_change_of_size_is_bit_equal(
    images, tmp_path, whole, shapes, monkeypatch, stop_after, rest
):
    from dino_kd.engine import loop

    chosen = settings(images, tmp_path / "run")
    real = loop._agree

    def agree(loss, norm, stop):
        if len(shapes) == stop_after:
            stop.request("a test")
        return real(loss, norm, stop)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_agree", agree)
        with pytest.raises(Interrupted):
            pretrain(chosen)
    assert state(tmp_path / "run")["step"] == stop_after
    shapes.clear()
    pretrain(chosen.model_copy(update={"resume": True}))
    assert [side for side, _ in shapes] == rest
    ours, theirs = state(tmp_path / "run"), state(whole)
    for name, value in theirs["task"].items():
        assert torch.equal(ours["task"][name], value), name
    rows = [without_times(read_metrics(d)) for d in (tmp_path / "run", whole)]
    assert rows[0] == rows[1]


@pytest.mark.dist
def test_two_processes_equal_one(images, tmp_path, whole):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "dino_kd", "pretrain", *SMALL_FIRST]
    command += [f"data.train={images}", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = state(tmp_path / "run")["task"], state(whole)["task"]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=2e-4, msg=name)
    losses = [[row["loss"] for row in read_metrics(d)] for d in (tmp_path / "run", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("network", [[], CNN])
def test_every_step_has_its_size_and_the_log_says_so(images, tmp_path, shapes, network):
    """0.75 x 16 = 12 px lies on no grid of 8, a ViT's patch here and every CNN's: it becomes 16."""
    pretrain(settings(images, tmp_path / "run", "curriculum.stages=2", *network))
    assert shapes == [(16, 8)] * 2 + [(24, 16)] * 2 + [(32, 16)] * 4
    said = (tmp_path / "run" / "train.log").read_text()
    assert "crops: 16 and 8 px, 24 and 16 px from step 3, 32 and 16 px from step 5" in said
    assert "step 2: crops have 24 and 16 px from now on" in said
    assert "step 4: crops have 32 and 16 px from now on" in said


def test_without_a_curriculum_every_step_is_at_full_size(images, tmp_path, shapes):
    pretrain(settings(images, tmp_path / "run", "curriculum.scale=1", "curriculum.length=80%"))
    assert shapes == [(32, 16)] * 8
    assert "crops: 32 and 16 px\n" in (tmp_path / "run" / "train.log").read_text()


def test_knn_is_scored_at_full_size_while_crops_are_small(images, tmp_path, monkeypatch):
    sizes = []
    real = KnnMonitor.score

    def score(self):
        hook = self.backbone.net.patch_embed.register_forward_pre_hook(
            lambda _, args: sizes.append(tuple(args[0].shape[-2:]))
        )
        try:
            return real(self)
        finally:
            hook.remove()

    monkeypatch.setattr(KnnMonitor, "score", score)
    monitor = [f"monitor.train={images}", f"monitor.test={images}", "monitor.every=2"]
    pretrain(settings(images, tmp_path / "run", *monitor))
    assert len(sizes) >= 8
    assert set(sizes) == {(32, 32)}
    scored = [row["step"] for row in read_metrics(tmp_path / "run") if "knn_top1" in row]
    assert scored == [2, 4, 6, 8]


def test_position_embeddings_live_at_the_full_grid():
    """Full size adds the very table; smaller images train every entry of it, exactly linearly."""
    torch.manual_seed(0)
    args = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    net = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=args).net
    table = net.pos_embed  # [1, 1 + 16, 32]
    zeros = lambda side: torch.zeros(1, side // 8, side // 8, 32)  # noqa: E731
    added = net._pos_embed(zeros(32))
    expected = table.clone()
    expected[:, :1] += net.cls_token
    assert torch.equal(added, expected)

    small = net._pos_embed(zeros(16))  # [1, 1 + 4, 32]
    weights = draw(1, 5, 32)
    (gradient,) = torch.autograd.grad((small * weights).sum(), table)
    assert (gradient.abs().amax(-1) > 0).all()  # the class token's row and all 16 of the grid
    # What is added is linear in the table, so its gradient predicts any finite change of it.
    change = draw(*table.shape, seed=1)
    with torch.no_grad():
        table.add_(change)
        moved = net._pos_embed(zeros(16))
    found = ((moved - small) * weights).sum()
    torch.testing.assert_close(found, (gradient * change).sum(), rtol=1e-4, atol=1e-4)


def test_the_stored_backbone_has_the_full_grid(whole):
    table = state(whole)["task"]["teacher.backbone.net.pos_embed"]
    assert table.shape == (1, 1 + 4 * 4, 32)


BAD = {
    "no share": (["curriculum.scale=1.5"], "curriculum.scale"),
    "zero": (["curriculum.scale=0"], "curriculum.scale"),
    "more than all": (["curriculum.length=120%"], "at most 100%"),
    "too long": (["curriculum.length=8"], "no step has crops of full size"),
    "too short": (["curriculum.length=1%"], "no step has smaller crops"),
    "rounds to full": (["curriculum.scale=0.95"], "rounds to full size on a grid of 8 px"),
    "off but set": (["curriculum.scale=1", "curriculum.stages=2"], "without effect at scale=1"),
    "stages": (["curriculum.stages=5"], "5 stages do not fit into 4 steps"),
    "off the grid": (["crops.global_size=36"], "36 x 36 px does not divide into patches of 8 px"),
    "fixed input size": (
        ["model.backbone=mixer_s32_224", "model.patch_size=null", "model.args={}",
         "crops.global_size=64", "crops.num_local_crops=0"],
        "mixer_s32_224 does not take 32 x 32 px beside 64 x 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_a_sentence_before_the_first_step(images, tmp_path, capsys, case):
    words, expected = BAD[case]
    given = {w.split("=")[0] for w in words}
    base = [*SMALL_FIRST, f"data.train={images}", f"run_dir={tmp_path}/run"]
    argv = [w for w in base if w.split("=")[0] not in given] + words
    assert cli.main(["pretrain", *argv]) == 2
    found = " ".join(capsys.readouterr().err.split())
    assert expected in found
    assert "Traceback" not in found
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("network", [[], CNN])
def test_half_the_side_is_less_than_a_third_of_the_work(images, tmp_path, network):
    """Counted, not timed: multiplications of a whole step by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    from dino_kd.data.multicrop import Crops
    from dino_kd.training import build_task

    task = build_task(settings(images, tmp_path / "run", "model.drop_path=0", *network))

    def work(side: int) -> int:
        pixels = [torch.zeros(2, 4, 3, s, s, dtype=torch.uint8) for s in (side, side // 2)]
        with FlopCounterMode(display=False) as counter:
            task(Crops(*pixels), {"teacher_temp": 0.04})[0].backward()
        return counter.get_total_flops()

    assert work(64) > 3 * work(32)
