"""The linear probe on small folders: choice, modes, files, processes, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd.data.dataset import subset
from dino_kd.data.loader import crop_batches, epoch_order
from dino_kd.data.multicrop import supervised_policy
from dino_kd.data.specs import make_dataset
from dino_kd.data.splits import holdout
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.features import extract_features
from dino_kd.models.backbone import create_backbone
from dino_kd.models.linear_head import check_head, load_linear_head
from dino_kd.pretrained import backbone_hash, load_backbone, save_backbone
from dino_kd.schema import FinetuneConfig
from eval import linear, probe_features
from eval.labelled import open_labelled_sets
from eval.probe_features import INPUTS

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 32, "depth": 5, "num_heads": 2}
CLASSES = ["ant", "bee", "cat"]
QUIET = ["device=cpu", "num_workers=0", "cache=off"]
SHORT = ["epochs=4", "train_batch=8", "held_out=0.3", "learning_rates=[0.001, 0.1, 1.0]"]


def write_images(root, classes, per_class, seed):
    """Noise around one colour per class (at most three): separable, but not trivially."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            colour = np.where(np.arange(3) == c, 140, 100)
            pixels = rng.normal(colour, 60, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def sets(tmp_path):
    return (
        write_images(tmp_path / "train", CLASSES, 12, seed=0),
        write_images(tmp_path / "test", CLASSES, 7, seed=1),
    )


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=TINY)
    save_backbone(backbone, tmp_path / "backbone")
    return tmp_path / "backbone"


def command(backbone, sets, *more):
    return [f"backbone={backbone}", f"train={sets[0]}", f"test={sets[1]}", *QUIET, *SHORT, *more]


def run(backbone, sets, output, *more):
    assert linear.main(command(backbone, sets, *more, f"output={output}")) == 0
    return json.loads(output.read_text())


def torch_head(batches, width, rate, steps):
    """nn.Linear, cross-entropy and optim.SGD with a cosine: the oracle."""
    head = torch.nn.Linear(width, len(CLASSES))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    for step, (features, labels) in enumerate(batches):
        factor = (1 + np.cos(np.pi * step / (steps - 1))) / 2
        optimiser.param_groups[0]["lr"] = rate * factor
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(features), labels).backward()
        optimiser.step()
    return head


def test_cached_scores_and_winner_equal_brute_force(sets, folder, tmp_path):
    """Every head anew by torch's own loop; the winner by a loop over all of them."""
    result = run(folder, sets, tmp_path / "r.json", "retrain=false")
    names = ["output", "mean", "block-2", "block-3", "block-4"]
    backbone = load_backbone(folder)
    bank, queries = (
        extract_features(backbone, make_dataset(str(s)), size=16, parts=names) for s in sets
    )
    fit, held = holdout(bank.labels.numpy(), 0.3, seed=0)
    best = (-1.0, 0.0)
    heads = iter(result["heads"])
    for name, parts in INPUTS.items():
        train_x, test_x = (torch.cat([b.part(p) for p in parts], 1) for b in (bank, queries))
        for rate in (0.001, 0.1, 1.0):
            rows = [
                fit[epoch_order(0, epoch, len(fit))][s : s + 8]
                for epoch in range(4)
                for s in range(0, len(fit) - 7, 8)
            ]
            assert len(rows) == 4 * (26 // 8)
            made = torch_head(
                [(train_x[r], bank.labels[r]) for r in rows], train_x.shape[1], rate * 8 / 256, 12
            )
            with torch.no_grad():
                logits = made(train_x[held])
                accuracy = 100 * (logits.argmax(1) == bank.labels[held]).double().mean().item()
                loss = torch.nn.functional.cross_entropy(logits, bank.labels[held]).item()
                test = 100 * (made(test_x).argmax(1) == queries.labels).double().mean().item()
            found = next(heads)
            assert (found["input"], found["learning_rate"]) == (name, rate)
            assert found["held_out_top1"] == pytest.approx(accuracy)
            assert found["held_out_cross_entropy"] == pytest.approx(loss, rel=1e-4)
            assert not found["diverged"]
            if (accuracy, -loss) > best:
                best, expected, expected_test = (accuracy, -loss), (name, rate), test
    winner = result["winner"]
    assert (winner["input"], winner["learning_rate"]) == expected
    assert winner["peak_learning_rate"] == pytest.approx(expected[1] * 8 / 256)
    assert result["metrics"]["linear_top1"] == pytest.approx(expected_test)
    assert result["metrics"]["linear_top5"] == 100  # three classes
    assert result["metrics"]["held_out_top1"] == pytest.approx(best[0])
    row = next(r for r in result["inputs"] if r["input"] == expected[0])
    assert row["test_top1"] == pytest.approx(expected_test)


def test_augmented_heads_equal_a_torch_loop_on_the_same_crops(sets, folder, tmp_path):
    """Crops and backbone by hand; the choice by features of centre crops."""
    more = ["mode=augmented", "inputs=last1", "learning_rates=1.0", "batch_size=3"]
    result = run(folder, sets, tmp_path / "r.json", *more)
    backbone, train = load_backbone(folder), make_dataset(str(sets[0]))
    fit, held = holdout(train.labels, 0.3, seed=0)
    crops = crop_batches(
        subset(train, fit), supervised_policy((16, 16)), batch_size=8, seed=0, start_step=0,
        total_steps=12,
    )  # fmt: skip
    batches = []
    for batch in crops:
        with torch.no_grad():
            features = backbone(backbone.preprocess(batch.crops.global_crops[0]))
        batches.append((features, torch.from_numpy(train.labels[fit])[batch.indices]))
    head = torch_head(batches, 32, 8 / 256, 12)
    bank = extract_features(backbone, train, size=16)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(head(bank.features[held]), bank.labels[held])
    assert result["heads"][0]["held_out_cross_entropy"] == pytest.approx(loss.item(), rel=1e-4)
    assert result["protocol"]["mode"] == "augmented"
    assert not result["winner"]["retrained"]
    kept = load_linear_head(tmp_path / "r_head.safetensors")
    torch.testing.assert_close(kept.linear.weight, head.weight, atol=1e-5, rtol=1e-3)


def test_the_test_images_never_choose(sets, folder, tmp_path, monkeypatch):
    """What is scored before the choice are held-out training images; test labels change nothing."""
    seen = []
    original = probe_features.Rows.batches

    def spy(self, num_logits):
        seen.append(self.where.tolist())
        return original(self, num_logits)

    monkeypatch.setattr(probe_features.Rows, "batches", spy)
    first = run(folder, sets, tmp_path / "a.json")
    _, held = holdout(make_dataset(str(sets[0])).labels, 0.3, seed=0)
    assert seen[0] == held.tolist()
    ant, bee = sets[1] / "ant", sets[1] / "bee"
    ant.rename(tmp_path / "swap")
    bee.rename(ant)
    (tmp_path / "swap").rename(bee)
    second = run(folder, sets, tmp_path / "b.json")
    assert first["heads"] == second["heads"]
    assert first["winner"] == second["winner"]
    assert first["metrics"] != second["metrics"]


def test_the_retrained_winner_saw_all_images_and_its_file_gives_its_logits(sets, folder, tmp_path):
    """Against a torch loop over all 36 images; the file scores what the table says."""
    more = ["inputs=last4+mean", "learning_rates=1.0"]
    result = run(folder, sets, tmp_path / "r.json", *more)
    assert result["winner"]["retrained"]
    parts = list(INPUTS["last4+mean"])
    backbone = load_backbone(folder)
    bank, queries = (
        extract_features(backbone, make_dataset(str(s)), size=16, parts=parts) for s in sets
    )
    x = torch.cat([bank.part(p) for p in parts], 1)
    rows = [epoch_order(0, e, 36)[s : s + 8] for e in range(4) for s in range(0, 29, 8)]
    expected = torch_head([(x[r], bank.labels[r]) for r in rows], x.shape[1], 8 / 256, len(rows))
    head = load_linear_head(tmp_path / "r_head.safetensors")
    torch.testing.assert_close(head.linear.weight, expected.weight, atol=1e-5, rtol=1e-3)
    logits = head({name: queries.part(name) for name in parts}).detach()
    top1 = 100 * (logits.argmax(1) == queries.labels).double().mean().item()
    assert result["metrics"]["linear_top1"] == pytest.approx(top1)
    assert head.class_names == CLASSES
    assert check_head(head, backbone, backbone_hash(backbone)) == []


def test_result_and_head_of_a_run_go_into_the_run(sets, folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    folder.rename(run_dir / "backbone")
    (run_dir / "config.yaml").write_text("run_dir: x\n")
    linear.main(command(run_dir, sets))
    result = json.loads((run_dir / "eval" / "linear_teacher.json").read_text())
    assert load_linear_head(run_dir / "eval" / "linear_head_teacher.safetensors").parts
    printed = capsys.readouterr().out
    assert f"linear top-1 {result['metrics']['linear_top1']:.2f} %" in printed
    assert "trained on all 36 images" in printed
    assert "21 test images, 25 train and 11 choose among 12 heads, 3 classes" in printed
    assert result["data"]["train"]["fit"] == 25


def test_inputs_that_coincide_are_trained_once(sets, tmp_path):
    """The mean patch of a ResNet is its output; a network of one block has no last four."""
    resnet = run("random:resnet10t", sets, tmp_path / "a.json", "image_size=32", "batch_size=4")
    assert resnet["protocol"]["inputs"] == {
        "last1": ["output"],
        "last4": ["block-4", "block-3", "block-2", "output"],
    }
    assert "last1+mean equals last1 for this network and is left out" in resnet["notes"]
    assert len(resnet["heads"]) == 6
    torch.manual_seed(0)
    shallow = create_backbone(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, args={**TINY, "depth": 1}
    )
    save_backbone(shallow, tmp_path / "shallow")
    found = run(tmp_path / "shallow", sets, tmp_path / "b.json")
    assert found["protocol"]["inputs"] == {"last1": ["output"], "last1+mean": ["output", "mean"]}


@pytest.mark.parametrize("mode", ["cached", "augmented"])
def test_pixels_have_one_input(sets, tmp_path, mode):
    result = run("pixels", sets, tmp_path / "r.json", f"mode={mode}", "epochs=20")
    assert result["protocol"]["inputs"] == {"last1": ["output"]}
    assert "pixels have one input only, called last1 here" in result["notes"]
    assert result["metrics"]["linear_top1"] > 60  # colours separate these classes; chance is 33


def test_a_fraction_is_the_part_that_fine_tuning_draws(sets, folder, tmp_path):
    """As if the folder held nothing else."""
    train = make_dataset(str(sets[0]))
    used, _ = holdout(train.labels, 0.5, seed=3)
    half = tmp_path / "half"
    for index in used:
        source = Path(train.path(int(index)))
        (half / source.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, half / source.parent.name)
    found = run(folder, sets, tmp_path / "part.json", "fraction=50%", "seed=3")
    alone = run(folder, (half, sets[1]), tmp_path / "half.json", "seed=3")
    assert found["data"]["train"]["images"] == len(used) == 18
    assert found["heads"] == alone["heads"]
    assert found["metrics"] == alone["metrics"]
    heads = [load_linear_head(tmp_path / f"{name}_head.safetensors") for name in ("part", "half")]
    for name, value in heads[0].state_dict().items():
        assert torch.equal(value, heads[1].state_dict()[name]), name
    tuned = FinetuneConfig(
        backbone=str(folder), train=str(sets[0]), test=str(sets[1]), run_dir="x", fraction=0.5,
        seed=3,
    )  # fmt: skip
    labelled = open_labelled_sets(tuned, 3).train
    assert [labelled.path(i) for i in range(18)] == [train.path(int(i)) for i in used]


def test_broken_images_are_left_out_and_counted(sets, folder, tmp_path):
    """One that fits, one that is held out, one of the test set; both modes hold out the same."""
    fit, held = holdout(make_dataset(str(sets[0])).labels, 0.3, seed=0)
    train = make_dataset(str(sets[0]))
    for index in (fit[0], held[0]):
        Path(train.path(int(index))).write_bytes(b"broken")
    (sets[1] / "bee" / "2.png").write_bytes(b"broken")
    for mode in ("cached", "augmented"):
        result = run(folder, sets, tmp_path / f"{mode}.json", f"mode={mode}")
        found = result["data"]["train"]
        assert (found["broken"], found["fit"], found["held_out"]) == (2, 24, 10), mode
        assert result["data"]["test"]["broken"] == 1


def test_diverged_heads_are_marked_and_never_win(sets, folder, tmp_path):
    more = ["learning_rates=[0.1, 1.0e+41]", "inputs=[last1, last4]"]
    result = run(folder, sets, tmp_path / "r.json", *more)
    assert [head["diverged"] for head in result["heads"]] == [False, True] * 2
    assert result["heads"][1]["held_out_top1"] is None
    assert result["winner"]["learning_rate"] == 0.1
    assert "2 of 4 heads diverged and were left out" in result["notes"]
    with pytest.raises(ConfigError, match=r"every head diverged; use rates below 1e\+41"):
        linear.main(command(folder, sets, "learning_rates=1.0e+41"))


def test_a_winner_at_the_edge_of_the_grid_is_noted(sets, tmp_path):
    result = run("pixels", sets, tmp_path / "r.json", "learning_rates=[1e-9, 0.1]", "epochs=20")
    (note,) = [n for n in result["notes"] if "edge" in n or "largest" in n]
    assert "0.1, is the largest of the grid" in note
    assert "add 0.3, 1 to learning_rates" in note


def test_the_batch_follows_the_number_of_images(sets, folder, tmp_path):
    """25 images fit: the largest power of two that leaves 16 steps is 1; the paper's is 1024."""
    more = ["train_batch=auto", "epochs=1", "inputs=last1"]
    result = run(folder, sets, tmp_path / "r.json", *more)
    assert result["protocol"]["train_batch"] == 1
    from dino_kd.config import load_settings
    from dino_kd.schema import LinearConfig
    from eval.probe import choose_batch

    words = ["backbone=x", "train=x", "test=x"]
    settings = load_settings(LinearConfig, words, command="linear")
    for images, expected in [(100, 4), (16_383, 512), (16_384, 1024), (1_281_167, 1024)]:
        assert choose_batch(settings, make_dataset(str(sets[0])), images) == expected


def test_labels_are_matched_by_name(tmp_path):
    """A test set without the first class must not shift the others."""
    train = write_images(tmp_path / "train", CLASSES, 12, seed=0)
    test = tmp_path / "test"
    for name in ("bee", "cat"):
        (test / name).mkdir(parents=True)
        for path in (train / name).iterdir():
            (test / name / path.name).write_bytes(path.read_bytes())
    result = run("pixels", (train, test), tmp_path / "r.json", "epochs=40")
    assert result["metrics"]["linear_top1"] > 90
    assert "1 classes of train have no test image: ant" in result["notes"]


def test_mistakes_in_the_data_are_named(sets, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (sets[0] / "ant").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"train: .*flat has no labels"):
        linear.main(command("pixels", (flat, sets[1])))
    with pytest.raises(DataError, match=r"test: .*flat has no labels"):
        linear.main(command("pixels", (sets[0], flat)))
    other = write_images(tmp_path / "other", ["ant", "wasp"], 1, seed=0)
    with pytest.raises(DataError, match=r"classes that the training images lack: wasp"):
        linear.main(command("pixels", (sets[0], other)))
    single = write_images(tmp_path / "single", ["ant"], 2, seed=0)
    with pytest.raises(DataError, match=r"single class, 'ant'"):
        linear.main(command("pixels", (single, sets[1])))
    lonely = write_images(tmp_path / "lonely", CLASSES, 1, seed=0)
    with pytest.raises(DataError, match=r"one image for each class \(3 in all\).*add images"):
        linear.main(command("pixels", (lonely, sets[1])))
    for path in sets[0].glob("*/*.png"):
        if path.stem != "0":
            path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"held-out images of|fewer than train_batch=8"):
        linear.main(command("pixels", sets))


def test_mistakes_in_the_settings_are_named(sets, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no backbone at 'runs/none'"):
        linear.main(command("runs/none", sets))
    with pytest.raises(ConfigError, match=r"train_batch: expected at most 25.*got 1024; auto"):
        linear.main(command(folder, sets, "train_batch=1024"))
    with pytest.raises(ConfigError, match=r"inputs.*last4\+mean"):
        linear.main(command(folder, sets, "inputs=[last2]"))
    with pytest.raises(ConfigError, match=r"learning_rates"):
        linear.main(command(folder, sets, "learning_rates=[]"))
    with pytest.raises(ConfigError, match=r"held_out"):
        linear.main(command(folder, sets, "held_out=0"))
    with pytest.raises(ConfigError, match=r"output: .* is a folder"):
        linear.main(command(folder, sets, f"output={tmp_path}"))


def torchrun(processes, argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", "-m", "eval.linear", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=180,
        capture_output=True,
        text=True,
    )


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes"), [("cached", 2), ("cached", 3), ("augmented", 2)])
def test_several_processes_give_the_numbers_of_one(sets, folder, tmp_path, mode, processes):
    """8 images a step on 2 and 3 processes, a broken one among them; equal up to rounding."""
    (sets[0] / "cat" / "6.png").write_bytes(b"broken")
    argv = command(folder, sets, f"mode={mode}", "batch_size=4", "retrain=true")
    one = run(folder, sets, tmp_path / "one.json", f"mode={mode}", "batch_size=4", "retrain=true")
    done = torchrun(processes, [*argv, f"output={tmp_path / 'many.json'}"])
    assert done.returncode == 0, done.stderr
    many = json.loads((tmp_path / "many.json").read_text())
    assert many["processes"] == processes
    assert many["data"] == one["data"]
    assert many["metrics"] == one["metrics"]
    assert many["winner"] == one["winner"]
    for found, expected in zip(many["heads"], one["heads"], strict=True):
        loss, expected_loss = (h.pop("held_out_cross_entropy") for h in (found, expected))
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert found == expected
    heads = [load_linear_head(tmp_path / f"{n}_head.safetensors").linear for n in ("one", "many")]
    torch.testing.assert_close(heads[1].weight, heads[0].weight, atol=1e-5, rtol=1e-3)


@pytest.mark.dist
@pytest.mark.slow
def test_crops_that_processes_cannot_share_evenly_are_refused(sets, folder):
    done = torchrun(3, command(folder, sets, "mode=augmented"))
    assert "train_batch: 8 images do not divide into 3 processes" in done.stderr
