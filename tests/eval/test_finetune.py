"""Fine-tuning end to end on tiny pictures: the result, resume, choice of weights, mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dino_kd import cli, load_backbone
from dino_kd.config import load_settings
from dino_kd.data.specs import make_dataset
from dino_kd.describe import leaves
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint
from dino_kd.errors import EXIT_INTERRUPTED, UserError
from dino_kd.features import extract_features
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import backbone_hash, save_backbone
from dino_kd.schema import FinetuneConfig, Settings
from eval import finetune, labelled
from tests.tiny import read_metrics, without_times

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ["ant", "bee", "cat"]
TINY = [
    "device=cpu", "num_workers=0", "augment.scale=[0.5, 1]", "optim.batch_size=8",
    "optim.length=9", "optim.base_lr=0.06", "optim.precision=fp32", "log.log_every=1",
    "log.save_every=4", "log.tensorboard=false",
]  # fmt: skip


def write_images(root, per_class, seed, classes=CLASSES):
    """Noise around one colour per class: separable."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            colour = np.where(np.arange(3) == c % 3, 160, 80)
            pixels = rng.normal(colour, 40, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A backbone and two labelled folders."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(1)
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=8, args=args)
    save_backbone(backbone, root / "backbone")
    write_images(root / "train", 12, seed=0)
    write_images(root / "test", 7, seed=1)
    return root


def words(world, run_dir, *more):
    given = {word.split("=")[0] for word in more}
    base = [
        f"backbone={world}/backbone", f"train={world}/train", f"test={world}/test",
        f"run_dir={run_dir}", *TINY,
    ]  # fmt: skip
    return [word for word in base if word.split("=")[0] not in given] + list(more)


def tune(world, run_dir, *more):
    finetune.main(words(world, run_dir, *more))
    return Path(run_dir)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """One uninterrupted run that the others are compared with."""
    return tune(world, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def whole_best(world, tmp_path_factory):
    return tune(world, tmp_path_factory.mktemp("best") / "run", *BEST)


BEST = ["select=best", "holdout=25%", "select_every=2"]


def result_of(run_dir):
    return json.loads((run_dir / "eval" / "finetune.json").read_text())


def final_state(run_dir):
    return load_checkpoint(run_dir / "checkpoints")[0]


def assert_same(a, b, where="state"):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_run(run_dir, reference):
    assert_same(final_state(run_dir), final_state(reference))
    assert without_times(read_metrics(run_dir)) == without_times(read_metrics(reference))
    assert result_of(run_dir)["metrics"] == result_of(reference)["metrics"]
    for name in ("backbone/model.safetensors", "classifier.safetensors"):
        assert_same(load_file(run_dir / name), load_file(reference / name))
    assert (run_dir / "crops.png").read_bytes() == (reference / "crops.png").read_bytes()


def accuracy(run_dir, images):
    """Top-1 in percent from the files of the run, with plain torch and one image at a time."""
    backbone, head = load_backbone(run_dir), load_file(run_dir / "classifier.safetensors")
    with safe_open(run_dir / "classifier.safetensors", "pt") as file:
        names = json.loads(file.metadata()["classes"])
    right = []
    for path in sorted(images.rglob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        with torch.no_grad():
            feature = backbone(backbone.preprocess(pixels))
        logits = feature @ head["weight"].T + head["bias"]
        right.append(names[int(logits.argmax())] == path.parent.name)
    return 100 * np.mean(right)


# --- the result


def test_the_run_directory_holds_a_scored_backbone_and_its_classifier(world, whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "config.yaml", "env.json", "metrics.jsonl", "train.log", "checkpoints", "backbone",
        "classifier.safetensors", "crops.png", "eval",
    }  # fmt: skip
    result = result_of(whole)
    assert result["metrics"]["top1"] == pytest.approx(accuracy(whole, world / "test"))
    assert result["metrics"]["top1"] > 60  # chance is 33
    assert result["metrics"]["top5"] == 100  # three classes
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert {"loss", "batch_top1", "grad_norm", "lr", "weight_decay"} <= rows[0].keys()
    state = final_state(whole)["task"]
    for name, value in load_file(whole / "backbone" / "model.safetensors").items():
        assert torch.equal(value, state[f"backbone.net.{name}"])


def test_json_says_how_the_number_came_about(world, whole):
    result = result_of(whole)
    start = load_backbone(world / "backbone")
    assert result["backbone"]["sha256"] == backbone_hash(start)
    assert result["backbone"]["finetuned_sha256"] == backbone_hash(load_backbone(whole))
    assert result["protocol"] == {
        "weights": "last", "step": 9, "steps": 9, "epochs": 2.25, "image_size": [16, 16],
        "resize": 16, "interpolation": "bicubic", "precision": "fp32",
    }  # fmt: skip
    assert result["data"]["train"] == {
        "spec": str(world / "train"), "images": 36, "classes": 3, "fraction": 1.0, "held_out": 0,
    }  # fmt: skip
    assert result["data"]["test"]["images"] == 21
    assert result["settings"]["optim"]["layer_decay"] == 0.75
    assert {"training", "scoring"} <= result["seconds"].keys()


def test_other_evaluators_score_the_fine_tuned_backbone(world, whole, tmp_path):
    """`dino-kd knn backbone=RUN`, and a plain refusal of networks that the run does not have."""
    argv = [f"train={world}/train", f"test={world}/test", "k=1", "cache=off", "num_workers=0"]
    output = tmp_path / "knn.json"
    assert cli.main(["knn", f"backbone={whole}", *argv, "device=cpu", f"output={output}"]) == 0
    found = json.loads(output.read_text())
    assert found["backbone"]["sha256"] == result_of(whole)["backbone"]["finetuned_sha256"]
    for branch in ("student", "untrained"):
        with pytest.raises(UserError, match="holds one network only"):
            load_backbone(whole, branch=branch)


def test_a_fine_tuned_run_can_start_another(world, whole, tmp_path):
    run = tune(world, tmp_path / "run", f"backbone={whole}", "optim.length=2")
    assert result_of(run)["backbone"]["sha256"] == backbone_hash(load_backbone(whole))


def test_untrained_networks_get_no_layer_decay_unless_asked(world, tmp_path, capsys):
    more = ["backbone=random:resnet10t", "image_size=16", "drop_path=0", "optim.length=2"]
    run = tune(world, tmp_path / "run", *more)
    assert result_of(run)["settings"]["optim"]["layer_decay"] == 1
    assert "(layer decay 1)" in capsys.readouterr().out
    run = tune(world, tmp_path / "asked", *more, "optim.layer_decay=0.5")
    scales = {group["lr_scale"] for group in final_state(run)["optimizer"]["param_groups"]}
    assert scales == {1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32}


def test_micro_batches_and_loader_processes_keep_the_run(world, tmp_path):
    plain = ["drop_path=0", "augment.mixup=0", "augment.cutmix=0", "optim.length=4"]
    run = tune(world, tmp_path / "run", *plain)
    split = tune(world, tmp_path / "split", *plain, "optim.accumulate=4", "num_workers=1")
    for name, value in final_state(run)["task"].items():
        torch.testing.assert_close(
            final_state(split)["task"][name], value, rtol=1e-2, atol=2e-4, msg=name
        )


def test_grey_images_and_bf16_end_well(world, tmp_path):
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    grey = create_backbone("vit_tiny_patch16_224", in_chans=1, img_size=16, patch_size=8, args=args)
    save_backbone(grey, tmp_path / "grey")
    more = [f"backbone={tmp_path}/grey", "optim.precision=bf16", "optim.length=2"]
    assert result_of(tune(world, tmp_path / "run", *more))["data"]["test"]["images"] == 21


# --- which images


@pytest.mark.parametrize(("fraction", "per_class"), [("25%", 3), ("0.5", 6), ("1%", 1), ("1", 12)])
def test_a_fraction_is_the_same_of_every_class_and_at_least_one(
    world, tmp_path, fraction, per_class
):
    settings = load_settings(
        FinetuneConfig, words(world, tmp_path / "r", f"fraction={fraction}"), command="finetune"
    )
    sets = labelled.open_labelled_sets(settings, 3)
    assert sets.train_labels.bincount().tolist() == [per_class] * 3
    again = labelled.open_labelled_sets(settings, 3)
    assert [sets.train.path(i) for i in range(len(sets.train))] == [
        again.train.path(i) for i in range(len(again.train))
    ]
    truth = [Path(sets.train.path(i)).parent.name for i in range(len(sets.train))]
    assert truth == [CLASSES[label] for label in sets.train_labels]
    other = settings.model_copy(update={"seed": 1})
    if fraction == "0.5":
        moved = labelled.open_labelled_sets(other, 3).train
        assert {moved.path(i) for i in range(18)} != {sets.train.path(i) for i in range(18)}


def test_held_out_images_are_of_train_and_not_trained_on(world, tmp_path):
    more = ["select=best", "fraction=50%", "holdout=34%"]
    settings = load_settings(
        FinetuneConfig, words(world, tmp_path / "r", *more), command="finetune"
    )
    sets = labelled.open_labelled_sets(settings, 3)
    train, held = ({data.path(i) for i in range(len(data))} for data in (sets.train, sets.held_out))
    assert (len(train), len(held), len(train & held)) == (12, 6, 0)
    assert all(path.startswith(str(world / "train")) for path in train | held)
    assert sets.held_out_labels.bincount().tolist() == [2, 2, 2]


def test_training_batches_bring_the_label_of_a_replacement(world, tmp_path):
    """With a broken image in every class; brightness of a channel tells the true class."""
    images = write_images(tmp_path / "train", 12, seed=0)
    for name in CLASSES:
        (images / name / "3.png").write_bytes(b"broken")
    settings = load_settings(
        FinetuneConfig, words(world, tmp_path / "r", f"train={images}"), command="finetune"
    )
    sets = labelled.open_labelled_sets(settings, 3)

    class Seen:
        count = 0

        def record(self, found):
            self.count += len(found)

    seen = Seen()
    span = finetune.make_span(
        36, batch_size=8, length=9, warmup=1, accumulate=1, world_size=1, images="train"
    )
    device = torch.device("cpu")
    for batch in labelled.training_batches(settings, sets, (16, 16), span, 1, device, seen):
        colours = batch.images.float().mean((2, 3))  # [B, 3]
        assert colours.argmax(1).tolist() == batch.labels.tolist()
    assert seen.count >= 3


def test_classes_are_matched_by_name_and_one_without_test_images_is_noted(world, tmp_path):
    """Against the accuracy by the names of the folders: a shift of labels would ruin it."""
    test = tmp_path / "test"
    for name in ("bee", "cat"):
        shutil.copytree(world / "test" / name, test / name)
    run = tune(world, tmp_path / "run", f"test={test}")
    result = result_of(run)
    assert result["metrics"]["top1"] == pytest.approx(accuracy(run, test))
    assert result["notes"] == ["1 classes of train have no test image: ant"]


# --- the choice of weights


def test_the_best_weights_on_the_held_out_part_are_scored(world, whole_best):
    rows = {row["step"]: row for row in read_metrics(whole_best)}
    scores = {step: row["holdout_top1"] for step, row in rows.items() if "holdout_top1" in row}
    assert list(scores) == [2, 4, 6, 8, 9]
    result = result_of(whole_best)
    step = result["protocol"]["step"]
    assert result["protocol"]["weights"] == "best"
    assert step == max(scores, key=lambda s: (scores[s], -s))
    assert result["metrics"]["holdout_top1"] == scores[step]
    assert result["metrics"]["top1"] == pytest.approx(accuracy(whole_best, world / "test"))
    assert final_state(whole_best)["best"]["step"] == step


def test_best_weights_differ_from_the_last_and_the_last_stay_in_the_checkpoint(world, tmp_path):
    """A learning rate that ruins the network late: the first score wins."""
    run = tune(
        world, tmp_path / "run", "select=best", "holdout=25%", "select_every=4",
        "optim.base_lr=40", "optim.warmup=8", "optim.clip_grad=0", "optim.length=9",
    )  # fmt: skip
    state, result = final_state(run), result_of(run)
    if result["protocol"]["step"] == 9:
        pytest.fail("the test's learning rate no longer ruins the network")
    saved = load_file(run / "classifier.safetensors")["weight"]
    assert torch.equal(saved, state["best"]["task"]["classifier.weight"])
    assert not torch.equal(saved, state["task"]["classifier.weight"])


# --- resume


def interrupt_at(step, monkeypatch):
    """Send SIGTERM while the batch of `step` is being fetched."""
    real = finetune.training_batches

    def batches(*args):
        for number, batch in enumerate(real(*args), start=1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(finetune, "training_batches", batches)


@pytest.mark.parametrize("stop_after", [1, 8])
@pytest.mark.parametrize("more", [[], BEST], ids=["last", "best"])
def test_resume_after_a_signal_is_bit_exact(
    world, tmp_path, whole, whole_best, more, stop_after, monkeypatch
):
    """Weights, optimiser, best weights, every row of metrics and the score; mixing is on."""
    run_dir = tmp_path / "run"
    interrupt_at(stop_after, monkeypatch)
    with pytest.raises(UserError, match=r"received SIGTERM.*dino-kd finetune .* resume=true") as e:
        tune(world, run_dir, *more)
    assert e.value.exit_code == EXIT_INTERRUPTED
    assert not (run_dir / "eval").exists()
    monkeypatch.undo()
    finetune.main([str(run_dir), "resume=true"])
    assert_same_run(run_dir, whole_best if more else whole)
    assert f"continued from step {stop_after};" in result_of(run_dir)["notes"][0]


def test_resume_of_a_finished_run_gives_its_result_again(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "eval")
    shutil.rmtree(run / "backbone")  # a kill between the checkpoint and the backbone
    finetune.main([str(run), "resume=auto"])
    assert_same_run(run, whole)


def test_resume_keeps_the_origin_when_its_source_went_on(world, tmp_path, monkeypatch, whole):
    """The backbone that the run started from has been overwritten meanwhile."""
    source = shutil.copytree(world / "backbone", tmp_path / "source")
    interrupt_at(3, monkeypatch)
    with pytest.raises(UserError, match="received SIGTERM"):
        tune(world, tmp_path / "run", f"backbone={source}")
    monkeypatch.undo()
    changed = load_backbone(source)
    torch.nn.init.normal_(changed.net.norm.bias)
    save_backbone(changed, source)
    finetune.main([str(tmp_path / "run"), "resume=true"])
    assert_same(final_state(tmp_path / "run")["task"], final_state(whole)["task"])
    found = result_of(tmp_path / "run")["backbone"]["sha256"]
    assert found == result_of(whole)["backbone"]["sha256"]


def test_relative_paths_resume_from_anywhere(world, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(world)
    interrupt_at(3, monkeypatch)
    with pytest.raises(UserError, match="received SIGTERM"):
        tune(world, tmp_path / "run", "backbone=backbone", "train=train", "test=folder:test")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    finetune.main([str(tmp_path / "run"), "resume=true"])
    assert_same(final_state(tmp_path / "run")["task"], final_state(whole)["task"])


def test_fixed_settings_are_refused_on_resume_with_a_diff_and_free_ones_are_not(
    world, whole, tmp_path
):
    run = shutil.copytree(whole, tmp_path / "run")
    finetune.main([str(run), "resume=true", "log.log_every=3", f"test={world}/train"])
    assert result_of(run)["data"]["test"]["images"] == 36
    with pytest.raises(UserError) as caught:
        finetune.main([str(run), "resume=true", "optim.base_lr=0.02", "fraction=0.5"])
    assert "optim.base_lr: 0.06 -> 0.02" in str(caught.value)
    assert "fraction: 1.0 -> 0.5" in str(caught.value)
    assert f"give it backbone={run}" in str(caught.value)


# --- mistakes: exit code 2, plain sentences, before the first step

BAD = {
    "batch larger than the set": (
        ["optim.batch_size=64"],
        r"train: .*train has 36 images, fewer than optim.batch_size=64; .* at most 36",
    ),
    "batch larger than the fraction": (
        ["fraction=10%"],
        r"\(4 of 36 images\) has 4 images, fewer than optim.batch_size=8",
    ),
    "nothing to hold out": (
        ["fraction=1%", "select=best", "optim.batch_size=1"],
        "every class has a single image among the 3 that are used",
    ),
    "one class": (["train={single}"], "train: .*single has a single class, 'ant'"),
    "no labels": (["train={flat}"], "train: .*flat has no labels"),
    "test without labels": (["test={flat}"], "test: .*flat has no labels"),
    "other classes": (["test={other}"], "classes that the training images lack: wasp"),
    "missing folder": (["train=/no/such/folder"], "/no/such/folder"),
    "unreadable test": (["test={broken}"], "test: none of 4 sampled images can be read"),
    "no backbone": (["backbone=runs/none"], "no backbone at 'runs/none'"),
    "pixels": (["backbone=pixels"], "pixels are no network"),
    "branch": (["branch=untrained"], "holds one network only"),
    "patch": (["image_size=20"], "20 x 20 px does not divide into patches of 8 px"),
    "fp16 on cpu": (["optim.precision=fp16"], "optim.precision: fp16 needs a CUDA device"),
    "cuda absent": (["device=cuda:99"], "cuda"),
    "unknown optimiser": (["optim.name=adamx"], "unknown optimiser 'adamx'; did you mean 'adamw'"),
    "layer decay 0": (["optim.layer_decay=0"], r"optim.layer_decay: expected .*got 0"),
    "layer decay 2": (["optim.layer_decay=2"], r"optim.layer_decay: expected .*got 2"),
    "fraction 0": (["fraction=0"], r"fraction: expected a share \(0.1\) or percent .*got 0"),
    "fraction 200%": (["fraction=200%"], r"fraction: expected a share .*got '200%'"),
    "fraction ten": (["fraction=ten%"], r"fraction: expected a share .*got 'ten%'"),
    "holdout": (["holdout=0.9"], "holdout: expected a share .* at most half, got 0.9"),
    "mixup": (["augment.mixup=-1"], "augment.mixup: expected a number >= 0, got -1"),
    "select": (["select=test"], "select: expected last or best, got 'test'"),
    "accumulate": (["optim.accumulate=3"], "multiple of 3"),
    "warm-up": (["optim.warmup=9"], "whole run has 9"),
    "misspelt": (["augment.mixupp=1"], "augment.mixup"),
    "word of another command": (["epochs=3"], "epochs: unknown setting"),
    "resume of nothing": (["resume=true"], "no run to resume"),
    "run inside data": (["run_dir={train}/run"], "inside the training folder"),
    "no stochastic depth": (
        ["backbone=random:dla46_c", "image_size=32", "drop_path=0.3"],
        "drop_path: dla46_c has no stochastic depth",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_a_sentence_and_exit_code_2(world, tmp_path, capsys, case):
    more, expected = BAD[case]
    single, flat, other, broken = (tmp_path / n for n in ("single", "flat", "other", "broken"))
    shutil.copytree(world / "train" / "ant", single / "ant")
    shutil.copytree(world / "train" / "ant", flat)
    write_images(other, 1, seed=0, classes=["ant", "wasp"])
    for path in write_images(broken, 2, seed=0).rglob("*.png"):
        path.write_bytes(b"no picture")
    places = {"single": single, "flat": flat, "other": other, "broken": broken}
    places["train"] = world / "train"
    more = [re.sub(r"\{(\w+)\}", lambda m: str(places[m[1]]), word) for word in more]
    assert cli.main(["finetune", *words(world, tmp_path / "run", *more)]) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_directory_that_holds_a_run_is_refused_without_resume(world, whole, capsys):
    assert cli.main(["finetune", *words(world, whole)]) == 2
    assert "already holds a run (last checkpoint step_00000009)" in capsys.readouterr().err


def test_a_run_directory_of_pretraining_is_not_continued(world, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run_dir: x\ndata: {train: y}\nteacher: {temp: 0.04}\n")
    assert cli.main(["finetune", *words(world, tmp_path, "resume=true")]) == 2
    error = capsys.readouterr().err
    assert "holds a run of dino-kd pretrain, not of dino-kd finetune" in error
    assert error.count("error:") == 1


def test_a_run_directory_in_use_names_its_owner(world, tmp_path, capsys):
    """The lock is held by this process through another file description."""
    from dino_kd.runlog import RunLog

    with RunLog(tmp_path / "run", is_main=True) as owner:
        owner.lock()
        assert cli.main(["finetune", *words(world, tmp_path / "run")]) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


def test_too_many_broken_images_stop_the_run_and_name_the_setting(world, tmp_path):
    images = write_images(tmp_path / "train", 12, seed=0)
    for number in range(1, 5):
        (images / "bee" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"\d of 36 images cannot be read, more than max_broken_"):
        tune(world, tmp_path / "run", f"train={images}")
    run = tune(world, tmp_path / "more", f"train={images}", "max_broken_share=0.2")
    assert "4 broken training images were replaced by others" in result_of(run)["notes"]


def test_broken_test_images_are_left_out_and_told(world, tmp_path, capsys):
    """The labels of the images after them do not shift."""
    test = shutil.copytree(world / "test", tmp_path / "test")
    for number in range(5):
        (test / "ant" / f"{number}.png").write_bytes(b"no picture")
    run = tune(world, tmp_path / "run", f"test={test}")
    assert result_of(run)["data"]["test"]["images"] == 16
    assert "5 broken test images left out" in capsys.readouterr().out
    for number in range(5):
        (test / "ant" / f"{number}.png").unlink()
    assert result_of(run)["metrics"]["top1"] == pytest.approx(accuracy(run, test))


def test_a_network_that_diverged_is_not_scored(world, tmp_path):
    with pytest.raises(UserError, match=r"training diverged|not finite"):
        tune(world, tmp_path / "run", "optim.base_lr=1e30", "optim.max_bad_steps=3")
    assert not (tmp_path / "run" / "eval").exists()


# --- no setting without effect


def test_every_setting_is_read(world, tmp_path, monkeypatch):
    """Walks the schema: each field must be read by a run, not only accepted."""
    seen = set()
    real = Settings.__getattribute__

    def record(self, name):
        if name in type(self).model_fields:
            seen.add((type(self).__name__, name))
        return real(self, name)

    argv = words(world, tmp_path / "run", *BEST, "optim.length=2")
    chosen = load_settings(FinetuneConfig, argv, command="finetune")
    monkeypatch.setattr(Settings, "__getattribute__", record)
    finetune.finetune(chosen)
    monkeypatch.undo()
    unread = set()
    for path, _ in leaves(FinetuneConfig):
        owner = FinetuneConfig
        for part in path.split(".")[:-1]:
            owner = owner.model_fields[part].annotation
        if (owner.__name__, path.split(".")[-1]) not in seen:
            unread.add(path)
    assert unread == set()


# --- processes


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, "-m", "eval.finetune", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_equal_one(world, tmp_path):
    """Losses up to rounding; the score of equal weights to the last image, one of them broken."""
    plain = ["drop_path=0", "augment.mixup=0", "augment.cutmix=0", *BEST, "optim.base_lr=0.02"]
    alone = tune(world, tmp_path / "alone", *plain)
    done = torchrun(*words(world, tmp_path / "both", *plain))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [[row["loss"] for row in read_metrics(tmp_path / d)] for d in ("alone", "both")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in final_state(alone)["task"].items():
        found = final_state(tmp_path / "both")["task"][name]
        torch.testing.assert_close(found, value, rtol=1e-2, atol=2e-4, msg=name)
    assert result_of(tmp_path / "both")["processes"] == 2

    test = shutil.copytree(world / "test", tmp_path / "test")
    (test / "ant" / "1.png").write_bytes(b"no picture")
    again = [f"test={test}", "resume=true"]
    results = []
    for name in ("one", "two"):
        run = shutil.copytree(alone, tmp_path / name)
        if name == "one":
            finetune.main([str(run), *again])
        else:
            done = torchrun(str(run), *again)
            assert done.returncode == 0, done.stdout + done.stderr
        results.append(result_of(run))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["data"]["test"] == results[1]["data"]["test"]
    assert results[1]["data"]["test"]["images"] == 20


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_with_batch_norm_keep_one_set_of_statistics(world, tmp_path):
    """Half of the images are scored by the other process; the saved network scores the same."""
    more = ["backbone=random:resnet18_cifar", "image_size=16", *BEST, "optim.base_lr=0.01"]
    done = torchrun(*words(world, tmp_path / "run", *more))
    assert done.returncode == 0, done.stdout + done.stderr
    found = result_of(tmp_path / "run")["metrics"]["top1"]
    assert found == pytest.approx(accuracy(tmp_path / "run", world / "test"))


@pytest.mark.dist
@pytest.mark.slow
def test_a_mistake_in_a_group_is_said_and_nothing_hangs(world, tmp_path):
    done = torchrun(*words(world, tmp_path / "run", "optim.batch_size=9"))
    assert done.returncode != 0
    assert "error: optim.batch_size: 9 images do not divide into 2 processes" in done.stderr
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_features_of_the_saved_backbone_are_those_that_were_scored(world, whole):
    """The offline path of every other evaluator sees the same network."""
    bank = extract_features(load_backbone(whole), make_dataset(f"{world}/test"), size=16)
    head = load_file(whole / "classifier.safetensors")
    logits = bank.features @ head["weight"].T + head["bias"]
    top1 = 100 * (logits.argmax(1) == bank.labels).double().mean().item()
    assert top1 == pytest.approx(result_of(whole)["metrics"]["top1"])
