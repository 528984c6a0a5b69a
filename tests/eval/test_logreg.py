"""The logreg command on small folders of images: numbers, choice of c, file, notes, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from dino_kd.data.specs import make_dataset
from dino_kd.data.splits import holdout
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.features import extract_features
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import load_backbone, save_backbone
from eval import logreg
from tests.eval.test_knn import QUIET, REPOSITORY, TINY


def write_images(root, classes, per_class, seed):
    """One colour per class (at most three) and another shift for every image: classes overlap."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            colour = np.where(np.arange(3) == c, 150, 110) + rng.normal(0, 25, 3)
            pixels = rng.normal(colour, 40, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def sets(tmp_path):
    classes = ["ant", "bee", "cat"]
    return (
        write_images(tmp_path / "train", classes, 30, seed=0),
        write_images(tmp_path / "test", classes, 20, seed=1),
    )


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=TINY)
    save_backbone(backbone, tmp_path / "backbone")
    return tmp_path / "backbone"


def command(backbone, sets, *more):
    return [f"backbone={backbone}", f"train={sets[0]}", f"test={sets[1]}", *QUIET, *more]


def run(argv, output):
    assert logreg.main([*argv, f"output={output}"]) == 0
    return json.loads(output.read_text())


def sklearn_scores(train, labels, test, truth, c, scaling):
    """Percent correct of scikit-learn's own pipeline."""
    if scaling == "standard":
        scale = StandardScaler().fit(train).transform
    else:
        scale = {"l2": normalize, "none": np.asarray}[scaling]
    model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(scale(train), labels)
    return 100 * model.score(scale(test), truth)


@pytest.mark.parametrize("scaling", ["standard", "l2", "none"])
def test_sweep_and_score_are_those_of_sklearn(sets, folder, tmp_path, scaling):
    """Every c on the held-out images and the final number, recomputed with scikit-learn."""
    cs = [0.01, 0.1, 1.0, 10.0]
    result = run(
        command(
            folder,
            sets,
            f"c={cs}",
            f"scaling={scaling}",
            "held_out=0.2",
            "seed=3",
            "tolerance=1e-5",
        ),
        tmp_path / "r.json",
    )
    backbone = load_backbone(folder)
    bank, queries = (extract_features(backbone, make_dataset(str(s)), size=16) for s in sets)
    train, labels = bank.features.double().numpy(), bank.labels.numpy()
    test, truth = queries.features.double().numpy(), queries.labels.numpy()
    fit, held = holdout(labels, 0.2, 3)
    expected = [
        sklearn_scores(train[fit], labels[fit], train[held], labels[held], c, scaling) for c in cs
    ]
    found = [row["held_out_top1"] for row in result["sweep"]]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert min(expected) < 100  # the images are not too easy to tell
    chosen = cs[int(np.argmax(expected))]  # the first, so the smallest, among equals
    assert result["protocol"]["c"] == chosen
    assert result["metrics"]["held_out_top1"] == max(found)
    assert result["metrics"]["logreg_top1"] == pytest.approx(
        sklearn_scores(train, labels, test, truth, chosen, scaling)
    )
    assert result["metrics"]["logreg_top5"] == 100.0  # three classes


def test_test_images_do_not_choose(sets, tmp_path):
    """Another test set, the same sweep and the same c."""
    other = write_images(tmp_path / "other", ["ant", "bee", "cat"], 4, seed=5)
    words = ["c=[0.001, 0.01, 0.1, 1]"]
    first = run(command("pixels", sets, *words), tmp_path / "a.json")
    second = run(command("pixels", (sets[0], other), *words), tmp_path / "b.json")
    assert first["sweep"] == second["sweep"]
    assert first["protocol"]["c"] == second["protocol"]["c"]


def test_one_c_needs_no_choice(sets, tmp_path, capsys):
    result = run(command("pixels", sets, "c=0.01"), tmp_path / "r.json")
    assert result["sweep"] == []
    assert result["protocol"]["c"] == 0.01
    assert result["protocol"]["c_chosen_on"] == "not chosen"
    assert "held_out_top1" not in result["metrics"]
    assert not [note for note in result["notes"] if "smallest" in note or "largest" in note]
    assert "with c = 0.01" in capsys.readouterr().out


def test_json_and_table_say_how_the_numbers_came_about(sets, folder, tmp_path, capsys):
    (sets[0] / "ant" / "0.png").write_bytes(b"broken")
    result = run(command(folder, sets, "c=[1, 0.1, 1]", "held_out=0.1"), tmp_path / "deep/r.json")
    protocol = result["protocol"]
    assert protocol["scaling"] == "standard"
    assert protocol["c_tried"] == [0.1, 1.0]
    assert protocol["c_chosen_on"] == "9 held-out training images"
    assert protocol["fitted_for_choice"] == 80
    assert result["data"]["train"]["images"] == 89
    assert result["data"]["train"]["broken"] == 1
    assert {"iterations", "gradient", "converged", "loss"} <= result["sweep"][0].keys()
    printed = capsys.readouterr().out
    assert "<- chosen" in printed
    assert f"top-1 {result['metrics']['logreg_top1']:.2f} %" in printed
    assert "broken train images left out" in printed
    assert logreg.headline(result) == [
        ("logistic regression top-1 %", f"{result['metrics']['logreg_top1']:.2f}")
    ]


@pytest.mark.parametrize(("cs", "edge"), [("[1e-8, 1e-7]", "smallest"), ("[1e-9, 1]", "largest")])
def test_a_choice_at_the_edge_is_noted(sets, folder, tmp_path, cs, edge):
    """Among useless values the smallest wins; a useful one at the end wins, and more may help."""
    result = run(command(folder, sets, f"c={cs}", "held_out=0.3"), tmp_path / "r.json")
    assert any(f"is the {edge} that was tried" in note for note in result["notes"])


def test_searches_that_are_cut_short_are_noted(sets, folder, tmp_path, capsys):
    words = ["c=[1, 1000]", "max_iterations=2", "tolerance=1e-6"]
    result = run(command(folder, sets, *words), tmp_path / "r.json")
    notes = [note for note in result["notes"] if "did not converge" in note]
    assert len(notes) == 2
    assert "c = 1, 1000 did not converge" in notes[0]
    assert "the final fit did not converge" in notes[1]
    assert all("raise max_iterations" in note for note in notes)
    assert "did not converge" in capsys.readouterr().out


def test_single_precision_that_goes_no_further_is_noted(sets, folder, tmp_path):
    result = run(command(folder, sets, "c=1", "tolerance=1e-12"), tmp_path / "r.json")
    assert any("goes no further: raise tolerance" in note for note in result["notes"])


def test_labels_are_matched_by_name(tmp_path):
    """A test set without the first class must not shift the others."""
    train = write_images(tmp_path / "train", ["ant", "bee", "cat"], 10, seed=0)
    test = tmp_path / "test"
    for name in ("bee", "cat"):
        (test / name).mkdir(parents=True)
        for path in (train / name).iterdir():
            (test / name / path.name).write_bytes(path.read_bytes())
    result = run(command("pixels", (train, test), "c=100"), tmp_path / "r.json")
    assert result["metrics"]["logreg_top1"] == 100.0  # pixels separate what was fitted
    assert result["notes"] == ["1 classes of train have no test image: ant"]


def test_a_class_without_readable_images_is_noted(sets, tmp_path):
    for path in (sets[0] / "bee").iterdir():
        path.write_bytes(b"broken")
    result = run(command("pixels", sets, "c=[0.01, 0.1]"), tmp_path / "r.json")
    assert any("never predicted: bee" in note for note in result["notes"])
    assert result["metrics"]["logreg_top1"] < 70


def test_mistakes_are_named(sets, folder, tmp_path):
    single = write_images(tmp_path / "single", ["ant"], 2, seed=0)
    with pytest.raises(DataError, match=r"train: .*single class, 'ant'"):
        logreg.main(command("pixels", (single, sets[1])))
    other = write_images(tmp_path / "other", ["ant", "wasp"], 1, seed=0)
    with pytest.raises(DataError, match=r"classes that the training images lack: wasp"):
        logreg.main(command("pixels", (sets[0], other)))
    one_each = write_images(tmp_path / "each", ["ant", "bee", "cat"], 1, seed=0)
    with pytest.raises(DataError, match=r"none can be held out to choose c; give one value"):
        logreg.main(command("pixels", (one_each, sets[1])))
    with pytest.raises(CheckpointError, match=r"no backbone at 'runs/none'"):
        logreg.main(command("runs/none", sets))
    with pytest.raises(ConfigError, match=r"output: .* is a folder"):
        logreg.main(command("pixels", sets, f"output={tmp_path}"))
    for word in (
        "c=0",
        "c=[]",
        "c=[1, -1]",
        "held_out=0",
        "held_out=0.6",
        "scaling=max",
        "seed=-1",
    ):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            logreg.main(command("pixels", sets, word))


def test_a_network_that_diverged_is_not_scored(sets, folder, tmp_path):
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"not finite on the train images"):
        logreg.main(command(tmp_path / "nan", sets))


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(sets, folder, tmp_path):
    """With one broken image among an odd number, to the last digit of the metrics."""
    (sets[1] / "cat" / "6.png").write_bytes(b"broken")
    argv = command(folder, sets, "c=[0.01, 0.1, 1]", "batch_size=4")
    one = run(argv, tmp_path / "one.json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [
            *launcher,
            "--nproc_per_node=2",
            "-m",
            "eval.logreg",
            *argv,
            f"output={tmp_path / 'two.json'}",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=180,
    )
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == one["metrics"]
    assert two["data"] == one["data"]
    assert two["protocol"] == one["protocol"]
    assert two["processes"] == 2
