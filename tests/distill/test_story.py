"""The distillation story on tiny real JPEGs: what it writes, resume, precision, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dino_kd import cli, load_backbone
from dino_kd.config import load_settings
from dino_kd.data.loader import EvalTransform
from dino_kd.data.specs import make_dataset
from dino_kd.distill.story import (
    Lesson,
    clean_batches,
    distill,
    images_to_fit,
    prepare,
    train,
)
from dino_kd.engine import loop
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint
from dino_kd.engine.schedules import ramped
from dino_kd.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError, DataError, UserError
from dino_kd.features import default_resize
from dino_kd.models.backbone import create_backbone
from dino_kd.models.batch_norm import recalibrate
from dino_kd.models.linear_head import HeadOrigin, LinearHead, save_linear_head
from dino_kd.pretrained import backbone_hash, save_backbone
from dino_kd.schema import DistillConfig, TermsSettings
from eval import knn
from tests.distill.timm_folder import write_timm_folder
from tests.tiny import read_metrics, without_times

TINY = [
    "device=cpu", "data.num_workers=0", "student.backbone=test_resnet",
    "student.args={}", "student.image_size=32", "optim.batch_size=12", "optim.length=6",
    "optim.precision=fp32", "optim.base_lr=0.01", "log.log_every=1", "log.save_every=4",
    "log.tensorboard=false", "fidelity.every=1", "recalibrate=24",
]  # fmt: skip
SMALL_VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
VIT_STUDENT = [
    "student.backbone=vit_tiny_patch16_224", f"student.args={json.dumps(SMALL_VIT)}",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A ViT of random weights, its linear head, and its prototypes' absence."""
    root = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    args = {k: v for k, v in SMALL_VIT.items() if k != "patch_size"}
    backbone = create_backbone(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        args=args,
        mean=(0.4,) * 3,
        std=(0.3,) * 3,
    ).eval()
    save_backbone(backbone, root / "net")
    origin = HeadOrigin("x", backbone_hash(backbone), (32, 32), backbone.mean, backbone.std)
    names = ["class_2", "other", "class_0", "class_1"]
    save_linear_head(LinearHead(("output",), [24], names, origin), root / "head.safetensors")
    return root


def words(images, teacher, run_dir, *more):
    base = [
        *TINY, f"data.train={images}", f"run_dir={run_dir}", f"teacher.backbone={teacher}/net",
        f"teacher.head={teacher}/head.safetensors",
    ]  # fmt: skip
    given = {word.split("=")[0] for word in more}
    return [word for word in base if word.split("=")[0] not in given] + list(more)


def settings(images, teacher, run_dir, *more):
    return load_settings(DistillConfig, words(images, teacher, run_dir, *more), command="distill")


@pytest.fixture(scope="module")
def whole(images, teacher, tmp_path_factory):
    """One uninterrupted run with labels, a feature term and an average, for comparison."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return distill(settings(images, teacher, run_dir, *RICH))


RICH = [
    "data.labels=0.5", "terms.cosine_kd.weight=1", "terms.cosine_kd.hidden_dim=16",
    "terms.queue_kd.weight=1", "terms.feature_kd.weight=0", "student.ema=0.5",
]  # fmt: skip


def final_state(run_dir):
    return load_checkpoint(run_dir / "checkpoints")[0]


def assert_same_run(run_dir, reference):
    """Bit for bit: state of training, metrics, and every network that is saved."""
    found, expected = final_state(run_dir), final_state(reference)
    assert found["step"] == expected["step"]
    assert found["task"].keys() == expected["task"].keys()
    for name, value in expected["task"].items():
        assert torch.equal(found["task"][name], value), name
    assert without_times(read_metrics(run_dir)) == without_times(read_metrics(reference))
    for file in ("backbone/model.safetensors", "classifier.safetensors", "projectors.safetensors"):
        one, other = load_file(run_dir / file), load_file(reference / file)
        assert all(torch.equal(one[name], other[name]) for name in other), file


def test_packed_images_give_the_same_run(images, teacher, tmp_path, whole):
    """Half of the images without labels: the whole folder is packed."""
    more = [f"data.pack={tmp_path}/packs", "data.num_workers=2"]
    run = distill(settings(images, teacher, tmp_path / "run", *RICH, *more))
    assert_same_run(run, whole)
    assert "data.pack: packing" in (run / "train.log").read_text()


# --- what is written


def test_the_run_directory_and_its_numbers(whole):
    names = {path.name for path in whole.iterdir()}
    assert {
        "config.yaml", "env.json", "metrics.jsonl", "train.log", "checkpoints", "backbone",
        "classifier.safetensors", "projectors.safetensors", "crops.png",
    } <= names  # fmt: skip
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 7))
    wanted = {
        "loss", "loss/ce", "loss/logit_kd", "loss/cosine_kd", "loss/queue_kd", "r2/cosine_kd",
        "spread/cosine_kd", "agreement", "kl", "gradient_cosine", "gradient_ratio", "weight/ce",
        "weight/logit_kd", "lr", "grad_norm",
    }  # fmt: skip
    for row in rows:
        assert wanted <= row.keys()
        total = sum(row[f"weight/{n}"] * row[f"loss/{n}"]
                    for n in ("ce", "logit_kd", "cosine_kd", "queue_kd"))  # fmt: skip
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert 0 <= row["agreement"] <= 100
        assert np.isfinite(list(row.values())).all()
    log = (whole / "train.log").read_text()
    assert "36 images, 18 of them with a label" in log
    assert "note: 1 of 4 classes of" in log


def test_the_saved_student_opens_by_every_door_without_its_projectors(whole, images, tmp_path):
    weights = load_file(whole / "backbone" / "model.safetensors")
    assert not [name for name in weights if "projector" in name or "queue" in name]
    net = timm.create_model(f"local-dir:{whole}/backbone", pretrained=True).eval()
    backbone = load_backbone(whole)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(x), backbone(x))
    assert backbone.img_size == (32, 32)
    # it is the average that was trained
    state = final_state(whole)["task"]
    average = {
        k.removeprefix("average.backbone.net."): v
        for k, v in state.items()
        if k.startswith("average.backbone.net.")
    }
    for name, value in average.items():
        if "running" not in name and "num_batches" not in name:  # recalibrated
            assert torch.equal(weights[name], value), name
    name = "layer1.0.conv1.weight"
    assert not torch.equal(average[name], state[f"student.backbone.net.{name}"])
    projectors = load_file(whole / "projectors.safetensors")
    assert {name.split(".")[0] for name in projectors} == {"cosine_kd", "queue_kd"}
    output = tmp_path / "knn.json"
    knn.main([
        f"backbone={whole}", f"train={images}", f"test={images}", "device=cpu", "num_workers=0",
        "cache=off", f"output={output}", "k=[1]",
    ])  # fmt: skip
    assert json.loads(output.read_text())["metrics"]


def test_the_classifier_knows_its_classes_and_can_teach(whole, images, teacher, tmp_path):
    with safe_open(whole / "classifier.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["class_0", "class_1", "class_2"]
        assert file.get_tensor("weight").shape == (3, 96)
    run = distill(
        settings(
            images, teacher, tmp_path / "run", f"teacher.backbone={whole}", "teacher.head=auto",
            *VIT_STUDENT, "optim.length=1",
        )
    )  # fmt: skip
    assert read_metrics(run)[0]["loss/logit_kd"] > 0


def test_statistics_are_the_plain_mean_over_clean_batches(whole, images):
    """By hand: whole images, no crop, no mix, one batch; unbiased variance as torch keeps it."""
    dataset = make_dataset(str(images), channels=3)
    chosen = np.linspace(0, 35, 24).round().astype(int)
    transform = EvalTransform((32, 32), default_resize((32, 32)))
    clean = np.stack([transform(dataset.read(i)) for i in chosen])
    pixels = torch.from_numpy(clean)
    if pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    backbone = load_backbone(whole)
    seen = []
    backbone.net.bn1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        backbone(backbone.preprocess(pixels))
    found = backbone.net.bn1
    torch.testing.assert_close(found.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.running_var, seen[0].var((0, 2, 3)), rtol=1e-3, atol=1e-4)
    state = final_state(whole)["task"]
    trained = state["average.backbone.net.bn1.running_mean"]
    assert not torch.allclose(found.running_mean, trained, atol=1e-3)


@pytest.mark.parametrize("words", [["recalibrate=0"], ["augment.mix_share=0"]], ids=str)
def test_without_mixing_or_wish_statistics_stay_as_trained(words, images, teacher, tmp_path):
    run = distill(settings(images, teacher, tmp_path / "run", "optim.length=2", *words))
    weights = load_file(run / "backbone" / "model.safetensors")
    state = final_state(run)["task"]
    for name, value in weights.items():
        assert torch.equal(value, state[f"student.backbone.net.{name}"]), name


def test_an_image_left_over_does_not_break_the_statistics():
    """129 images make a batch of one, whose 1 x 1 map has no variance."""
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", img_size=32).train()
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        for n in (4, 6, 1)
    ]
    recalibrate(backbone, batches)
    assert all(module.training for module in backbone.modules())
    assert backbone.net.bn1.momentum == 0.1
    means = []
    for images in batches[:2]:
        x = (images / 255 - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(
            backbone.std
        ).view(3, 1, 1)
        means.append(backbone.net.conv1(x).mean((0, 2, 3)).detach())
    torch.testing.assert_close(
        backbone.net.bn1.running_mean, (means[0] + means[1]) / 2, rtol=1e-3, atol=1e-4
    )
    recalibrate(nn.Linear(1, 1), iter([]))  # nothing to do, nothing read


# --- terms


def test_without_labels(images, teacher, tmp_path):
    run = distill(
        settings(images, teacher, tmp_path / "run", "terms.preset=label_free", "optim.length=3")
    )
    rows = read_metrics(run)
    assert {"loss/cosine_kd", "loss/relation_kd", "r2/cosine_kd"} <= rows[0].keys()
    assert not {"agreement", "loss/ce", "gradient_cosine"} & rows[0].keys()
    assert not (run / "classifier.safetensors").exists()
    assert "36 images, 0 of them with a label" in (run / "train.log").read_text()


def test_labels_alone_need_no_teacher_that_exists(images, teacher, tmp_path):
    run = distill(
        settings(
            images, teacher, tmp_path / "run", "terms.preset=none", "terms.ce.weight=1",
            "data.labels=0.5", "teacher.backbone=/nowhere", "optim.length=3",
        )
    )  # fmt: skip
    rows = read_metrics(run)
    assert {"loss/ce"} == {name for name in rows[0] if name.startswith("loss/")}
    assert not (run / "projectors.safetensors").exists()
    assert "18 images, 18 of them with a label" in (run / "train.log").read_text()


ALL_TERMS = {
    "ce": 1, "logit_kd": 4, "dkd": 1, "dist": 1, "feature_kd": 1, "cosine_kd": 1,
    "attention_kd": 1, "relation_kd": 0.5, "queue_kd": 1, "crd": 0.1,
}  # fmt: skip


def test_all_terms_at_once_with_two_teachers(images, teacher, tmp_path):
    run = distill(
        settings(
            images, teacher, tmp_path / "run", "optim.length=3", "terms.preset=none",
            *[f"terms.{name}.weight={weight}" for name, weight in ALL_TERMS.items()],
            "terms.attention_kd.strides=[8]", "terms.crd.negatives=16", "terms.crd.dim=8",
            "terms.cosine_kd.hidden_dim=16", "terms.relation_kd.tokens=1",
            "terms.feature_kd.fade=1",
            f"more_teachers=[{{backbone: {teacher}/net, head: {teacher}/head.safetensors, "
            "image_size: 48, weight: 3}]",
        )
    )  # fmt: skip
    rows = read_metrics(run)
    for name in ALL_TERMS:
        assert np.isfinite(rows[-1][f"loss/{name}"])
    assert [row["weight/feature_kd"] for row in rows] == pytest.approx(
        [0.25, 0.25 * 2 / 3, 0.25 / 3]
    )
    assert rows[0]["weight/feature_kd@1"] == pytest.approx(0.75)
    assert rows[0]["weight/attention_kd@1"] == pytest.approx(0.75)
    # the targets were standardised before the first step, from the teacher's own maps
    scale = load_file(run / "projectors.safetensors")["feature_kd.standardise.scale"]
    assert not torch.equal(scale, torch.ones_like(scale))
    assert rows[0]["loss/feature_kd"] < 5


def test_a_student_with_a_distillation_token(images, teacher, tmp_path):
    run = distill(
        settings(
            images, teacher, tmp_path / "run", "terms.preset=none", "terms.ce.weight=1",
            "terms.token_kd.weight=1", "optim.length=2",
            "student.backbone=deit_tiny_distilled_patch16_224",
            f"student.args={json.dumps(SMALL_VIT)}",
        )
    )  # fmt: skip
    weights = load_file(run / "classifier.safetensors")
    assert {name: tuple(v.shape) for name, v in weights.items()} == {
        "weight": (3, 24), "bias": (3,), "token_weight": (3, 24), "token_bias": (3,),
    }  # fmt: skip
    assert load_backbone(run).num_prefix_tokens == 2


def test_a_control_learns_from_another_teacher(images, teacher, tmp_path):
    given = settings(images, teacher, tmp_path / "run", "optim.length=1")
    device = torch.device("cpu")
    real, control = (prepare(given, device, control=c).teachers[0] for c in (False, True))
    assert real.fingerprint() != control.fingerprint()
    assert control.name.startswith("control of")
    distill(given, control=True)
    assert "teacher: control of" in (tmp_path / "run" / "train.log").read_text()


def test_a_weight_rises_at_the_start_and_falls_to_nothing_at_the_end():
    falling = ramped(2.0, 0.0, 0.25, 8)
    assert [falling(step) for step in range(9)] == [2, 2, 2, 2, 2, 2, 2, 1, 0]
    assert [ramped(2.0, 0.0, 0.0, 8)(step) for step in (0, 7)] == [2, 2]
    assert [ramped(2.0, 0.0, 1.0, 4)(step) for step in range(4)] == [2, 1.5, 1, 0.5]
    assert [ramped(2.0, 0.5, 0.0, 8)(step) for step in range(8)] == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert [ramped(4.0, 0.5, 0.25, 8)(step) for step in range(8)] == [1, 2, 3, 4, 4, 4, 4, 2]


def test_dkd_warms_up_as_published():
    """20 of 240 epochs: after a tenth of the run the weight is whole."""
    terms = TermsSettings(preset="none", dkd={"weight": 1.0})  # type: ignore[arg-type]
    schedule = ramped(1.0, terms.dkd.rise, terms.dkd.fade, 240)
    published = [min(epoch / 20, 1) for epoch in range(1, 241)]
    assert [schedule(epoch) for epoch in range(240)] == pytest.approx(published, abs=0.05)


def test_a_pretraining_runs_own_prototypes_teach_without_labels(images, pretrained, tmp_path):
    """The run's heads.safetensors, through its bottleneck and last layer; no label is read."""
    run = distill(
        load_settings(DistillConfig, [
            *TINY, f"data.train={images}", "data.labels=0", f"teacher.backbone={pretrained}",
            "terms.preset=none", "terms.prototype_kd.weight=1", "optim.length=12",
            "terms.prototype_kd.hidden_dim=16", f"run_dir={tmp_path / 'run'}",
        ], command="distill")
    )  # fmt: skip
    rows = read_metrics(run)
    heads = load_file(pretrained / "heads.safetensors")
    projected = load_file(run / "projectors.safetensors")
    own, taught = projected["prototype_kd.head.last_layer"], heads["teacher.last_layer"]
    assert len(own) == len(taught)
    losses = [row["loss/prototype_kd"] for row in rows]
    assert 0 < losses[-1] < losses[0]
    assert not (run / "classifier.safetensors").exists()
    assert (run / "backbone" / "model.safetensors").is_file()


def test_gradients_are_compared_in_rows_that_are_written(images, teacher, tmp_path):
    """Every 3 steps asked for, every 2 logged: at the next multiple, and at the end."""
    run = distill(
        settings(images, teacher, tmp_path / "run", "fidelity.every=3", "log.log_every=2")
    )
    compared = [row["step"] for row in read_metrics(run) if "gradient_cosine" in row]
    assert compared == [4, 6]


# --- resume


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(
    at, whole, images, teacher, tmp_path, monkeypatch
):
    """Killed in the middle, before (2) and after (5) its first checkpoint."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        seen = []
        agree = loop._agree

        def kill(*given):
            seen.append(1)
            if len(seen) > at:
                raise RuntimeError("power cut")
            return agree(*given)

        patch.setattr(loop, "_agree", kill)
        with pytest.raises(RuntimeError, match="power cut"):
            distill(settings(images, teacher, run_dir, *RICH))
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == (
        ["step_00000004"] if at == 5 else []
    )
    distill(settings(images, teacher, run_dir, *RICH, "resume=true"))
    assert_same_run(run_dir, whole)


def test_a_killed_end_is_saved_by_the_next_start(whole, images, teacher, tmp_path, monkeypatch):
    """After the last checkpoint, before the recalibrated student was written."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dino_kd.distill.story.recalibrate", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill(settings(images, teacher, run_dir, *RICH))
    distill(settings(images, teacher, run_dir, *RICH, "resume=auto"))
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_a_signal_ends_the_command_after_a_checkpoint(images, teacher, tmp_path):
    run_dir = tmp_path / "run"
    argv = words(images, teacher, run_dir, "optim.length=4000", "log.save_every=4000")
    process = subprocess.Popen(
        [sys.executable, "-m", "dino_kd", "distill", *argv], cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.time() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.time() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, output
    assert "resume=true" in output
    assert 0 < final_state(run_dir)["step"] < 4000


def test_other_settings_are_refused_on_resume(whole, images, teacher):
    for change, name in (
        ("terms.logit_kd.weight=2", "terms.logit_kd.weight: 4.0 -> 2.0"),
        ("student.image_size=40", "student.image_size: 32 -> 40"),
        ("teacher.image_size=48", "teacher.image_size: None -> 48"),
    ):
        with pytest.raises(ConfigError, match=name):
            distill(settings(images, teacher, whole, *RICH, change, "resume=true"))
    with pytest.raises(ConfigError, match=r"already holds a run .*resume=true"):
        distill(settings(images, teacher, whole, *RICH))


# --- arithmetic


def test_half_precision_and_micro_batches_give_nearly_the_same(images, teacher, tmp_path):
    """A ViT and terms without batch norm: micro-batches change rounding only."""
    found = {}
    for name, more in {
        "plain": [], "bf16": ["optim.precision=bf16"], "parts": ["optim.accumulate=3"],
    }.items():  # fmt: skip
        run = distill(
            settings(
                images, teacher, tmp_path / name, *VIT_STUDENT, "optim.base_lr=0.001", *more,
                "terms.feature_kd.weight=0", "terms.cosine_kd.weight=0",
            )
        )  # fmt: skip
        found[name] = [row["loss"] for row in read_metrics(run)]
    assert found["parts"] == pytest.approx(found["plain"], rel=1e-3)
    assert found["bf16"] == pytest.approx(found["plain"], rel=0.05)
    assert found["bf16"] != found["plain"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(images, teacher, tmp_path, accumulate):
    """A ViT student, no mixing (partners are those of one process) and no batch norm."""
    plain = [
        *VIT_STUDENT, "augment.mix_share=0", "data.labels=0.5", "optim.length=10",
        f"optim.accumulate={accumulate}", "optim.base_lr=0.001", "terms.dkd.weight=1",
        "terms.cosine_kd.weight=0", "terms.feature_kd.weight=0",  # their projectors have batch norm
    ]  # fmt: skip
    alone = distill(settings(images, teacher, tmp_path / "one", *plain))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "dino_kd", "distill", *words(images, teacher, tmp_path / "two", *plain)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = final_state(tmp_path / "two"), final_state(alone)
    for name, value in expected["task"].items():
        torch.testing.assert_close(found["task"][name], value, rtol=1e-2, atol=2e-4, msg=name)
    losses = [[row["loss"] for row in read_metrics(d)] for d in (tmp_path / "two", alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["teacher.backbone=runs/frist"], "no backbone at"),
        (["teacher.head=auto"], "teacher.head: a term of the loss needs logits"),
        (["student.backbone=resnet81"], "unknown backbone 'resnet81'; did you mean 'resnet"),
        (["student.image_size=30", *VIT_STUDENT], "student.image_size: 30 x 30 px"),
        (["optim.name=adam"], "optimiser 'adam'; did you mean 'adamw'"),
        (["optim.batch_size=60"], "data.train"),
        (["data.train=/nowhere"], "data.train"),
        (["student.init_from=/nowhere"], "no backbone at '/nowhere'"),
        (
            ["terms.prototype_kd.weight=1"], "terms.prototype_kd needs the projection head",
        ),
        (["data.labels=0"], "data.labels=0, but terms.ce needs labels"),
        (["optim.batch_size=1", "terms.preset=label_free"], "optim.batch_size"),
        (["optim.batch_size=12", "optim.accumulate=12"], "optim.batch_size"),
        (["optim.batch_size=2", *VIT_STUDENT, "terms.preset=label_free"], "relation_kd"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_written(more, message, images, teacher, tmp_path):
    with pytest.raises(UserError) as error:
        distill(settings(images, teacher, tmp_path / "run", *more))
    assert message in str(error.value)
    assert not re.search(r"\bmodel\.[a-z_]+:|student\.safetensors", str(error.value))
    assert not (tmp_path / "run").exists()


def test_a_run_inside_the_images_is_refused(images, teacher):
    with pytest.raises(ConfigError, match="lies inside the training folder"):
        distill(settings(images, teacher, images / "run"))
    assert not (images / "run").exists()


def test_teachers_of_different_classes_cannot_be_averaged(images, teacher, tmp_path):
    """Without labels nothing tells which classes are meant."""
    for count in (3, 5):
        write_timm_folder(tmp_path / str(count), count)
    with pytest.raises(ConfigError, match="logits of 3, 5 classes cannot be averaged"):
        distill(
            settings(
                images, teacher, tmp_path / "run", "terms.preset=none", "terms.dist.weight=1",
                f"teacher.backbone=local-dir:{tmp_path}/3", "teacher.head=timm",
                f"more_teachers=[{{backbone: 'local-dir:{tmp_path}/5', head: timm}}]",
            )
        )  # fmt: skip


def test_the_command_says_it_in_one_line(images, teacher, tmp_path, capsys):
    argv = words(images, teacher, tmp_path / "run", "terms.logit_dk.weight=1")
    assert cli.main(["distill", *argv]) == 2
    printed = capsys.readouterr()
    assert "terms.logit_dk.weight: unknown setting" in printed.out + printed.err
    assert "'terms.logit_kd.weight'" in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err


def test_the_teacher_that_changes_is_noticed(images, teacher, tmp_path, monkeypatch):
    def spoil(lesson: Lesson, *rest):
        lesson.teachers[0].head.linear.bias.data += 1
        return train(lesson, *rest)

    monkeypatch.setattr("dino_kd.distill.story.train", spoil)
    with pytest.raises(CheckpointError, match="the teacher changed"):
        distill(settings(images, teacher, tmp_path / "run", "optim.length=1"))


def test_clean_batches_are_whole_images(images, teacher, tmp_path):
    lesson = prepare(settings(images, teacher, tmp_path / "run"), torch.device("cpu"))
    (batch,) = clean_batches(lesson, 24)
    assert batch.dtype == torch.uint8
    assert batch.shape == (24, 3, 32, 32)
    with pytest.raises(DataError):
        prepare(settings(images, teacher, tmp_path / "run", "data.labels=0"), torch.device("cpu"))


def test_scales_are_learned_from_as_many_images_as_hold_enough_places(images, teacher, tmp_path):
    (one,) = prepare(settings(images, teacher, tmp_path / "run"), torch.device("cpu")).teachers
    shape = one.shapes(["map"])["map"]
    wanted = 100 * shape[0] / (shape[1] * shape[2])
    assert images_to_fit(one, ["map"]) == min(2048, max(64, int(np.ceil(wanted))))
    assert images_to_fit(one, ["output"]) == min(2048, 100 * one.shapes(["output"])["output"][0])


def test_a_run_with_test_images_ends_with_its_score(images, teacher, tmp_path, capsys):
    """Against the saved files, asked by hand, image by image."""
    run_dir = tmp_path / "run"
    more = [f"data.test={images}", "terms.logit_kd.weight=1"]
    assert cli.main(["distill", *words(images, teacher, run_dir, *more)]) == 0
    printed = capsys.readouterr().out
    backbone, dataset = load_backbone(run_dir).eval(), make_dataset(str(images))
    saved = load_file(run_dir / "classifier.safetensors")
    view = EvalTransform((32, 32), default_resize((32, 32)))
    right = 0
    for index, label in enumerate(dataset.labels):
        pixels = torch.from_numpy(np.ascontiguousarray(view(dataset.read(index))))[None]
        with torch.no_grad():
            logits = backbone(backbone.preprocess(pixels)) @ saved["weight"].T + saved["bias"]
        right += int(logits.argmax() == label)
    result = json.loads((run_dir / "eval" / "distill.json").read_text())
    expected = 100 * right / len(dataset)
    assert result["metrics"]["top1"] == pytest.approx(expected)
    assert f"top-1 {expected:.2f} %" in printed
    assert "score it" not in printed


def test_a_run_without_labels_is_scored_by_neighbours(images, teacher, tmp_path, capsys):
    run_dir = tmp_path / "run"
    more = [f"data.test={images}", "data.labels=0", "terms.preset=label_free"]
    assert cli.main(["distill", *words(images, teacher, run_dir, *more)]) == 0
    result = json.loads((run_dir / "eval" / "distill.json").read_text())
    assert f"k-NN (k=20) top-1 {result['metrics']['knn20_top1']:.2f} %" in capsys.readouterr().out
    assert result["protocol"]["voters"] == str(images)
