"""The fewshot command on small folders of images: draws, classifiers, statistics, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

from dino_kd.data.specs import make_dataset
from dino_kd.data.splits import draw_fraction, draw_shots
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.features import extract_features
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import load_backbone, save_backbone
from eval import fewshot
from tests.eval.test_knn import QUIET, REPOSITORY, TINY
from tests.eval.test_logreg import write_images


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
    assert fewshot.main([*argv, f"output={output}"]) == 0
    return json.loads(output.read_text())


def vote(distance):
    """DINO's weights from cosine distance."""
    return np.exp((1 - distance) / 0.07)


RIVALS = {
    "logreg": lambda n: LogisticRegression(C=100.0, tol=1e-8, max_iter=5000),
    "ridge": lambda n: RidgeClassifier(alpha=0.1),
    "prototype": lambda n: NearestCentroid(),
    "knn": lambda n: KNeighborsClassifier(min(n, 20), weights=vote, metric="cosine"),
}


@pytest.mark.parametrize("classifier", sorted(RIVALS))
def test_every_draw_scores_as_with_sklearn(sets, folder, tmp_path, classifier):
    result = run(
        command(
            folder,
            sets,
            f"classifier={classifier}",
            "shots=[1, 5]",
            "fractions=40%",
            "draws=2",
            "seed=4",
        ),
        tmp_path / "r.json",
    )
    backbone = load_backbone(folder)
    bank, queries = (extract_features(backbone, make_dataset(str(s)), size=16) for s in sets)
    train, test = (normalize(b.features.double().numpy()) for b in (bank, queries))
    labels, truth = bank.labels.numpy(), queries.labels.numpy()
    expected = []
    for rows in [
        *(draw_shots(labels, n, seed) for n in (1, 5) for seed in (4, 5)),
        *(draw_fraction(labels, 0.4, seed) for seed in (4, 5)),
    ]:
        model = RIVALS[classifier](len(rows)).fit(train[rows], labels[rows])
        expected.append((len(rows), 100 * float(np.mean(model.predict(test) == truth))))
    found = [(drawn["images"], drawn["top1"]) for drawn in result["draws"]]
    assert [n for n, _ in found] == [3, 3, 15, 15, 36, 36]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert len({score for _, score in found}) > 2  # the images are not too easy to tell
    assert result["protocol"]["classifier"] == classifier


def test_statistics_are_those_of_numpy_and_scipy(sets, folder, tmp_path, capsys):
    result = run(command(folder, sets, "shots=3", "fractions=[]", "draws=4"), tmp_path / "r.json")
    values = [drawn["top1"] for drawn in result["draws"]]
    assert len(set(values)) > 1
    metrics = result["metrics"]
    assert metrics["shots3_top1"] == pytest.approx(np.mean(values))
    assert metrics["shots3_top1_sd"] == pytest.approx(np.std(values, ddof=1))
    assert metrics["shots3_top1_min"] == min(values)
    assert metrics["shots3_top1_max"] == max(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert metrics["shots3_top1_ci95"] == pytest.approx((high - low) / 2)
    shown = f"{np.mean(values):.2f} +- {(high - low) / 2:.2f}"
    assert fewshot.headline(result) == [("few-shot top-1 %, 3 per class", shown)]
    assert "4 draws; 60 test images, drawn from 90" in capsys.readouterr().out


def test_one_draw_has_no_interval(sets, tmp_path, capsys):
    result = run(command("pixels", sets, "shots=2", "draws=1"), tmp_path / "r.json")
    assert result["metrics"]["shots2_top1_sd"] is None
    assert result["metrics"]["shots2_top1_ci95"] is None
    assert "1 draw, so no interval" in capsys.readouterr().out
    assert "+-" not in fewshot.headline(result)[0][1]


def test_draws_follow_from_seed_and_number_alone(sets, tmp_path):
    """Neither the other budgets, nor the number of draws, nor the classifier changes them."""
    first = run(command("pixels", sets, "shots=[2, 5]", "draws=3", "seed=0"), tmp_path / "a.json")
    second = run(
        command("pixels", sets, "shots=5", "fractions=[]", "draws=2", "seed=1", "classifier=knn"),
        tmp_path / "b.json",
    )

    def hashes(result):
        return {(d["labels"], d["seed"]): d["sha256"] for d in result["draws"]}

    both = hashes(first).keys() & hashes(second).keys()
    assert both == {("shots5", 1), ("shots5", 2)}
    assert all(hashes(first)[key] == hashes(second)[key] for key in both)
    assert len(set(hashes(first).values())) == 12  # every draw is another one


def test_shares_that_leave_a_class_empty_are_noted(sets, tmp_path):
    result = run(command("pixels", sets, "shots=[]", "fractions=[1%, 10%]"), tmp_path / "r.json")
    assert result["draws"][0]["images"] == 3
    assert result["draws"][-1]["images"] == 9
    assert result["notes"] == [
        "1% of 3 classes is less than half an image (such as 'ant', 30 images): one image of each "
        "is used"
    ]


def test_searches_that_are_cut_short_are_noted(sets, tmp_path, monkeypatch):
    """The solver is told to stop at once."""
    original = fewshot.fit_logistic
    monkeypatch.setattr(
        fewshot, "fit_logistic", lambda *words: original(*words, max_iterations=1, tolerance=1e-9)
    )
    result = run(command("pixels", sets, "shots=5", "fractions=[]", "draws=2"), tmp_path / "r.json")
    assert any("did not converge in 2 of 2 draws" in note for note in result["notes"])
    assert not any(drawn["converged"] for drawn in result["draws"])


def test_more_shots_than_images_name_the_class(sets, tmp_path):
    for i in range(25):
        (sets[0] / "bee" / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"shots: 10 .* class 'bee' has 5 images in train; use sh"):
        fewshot.main(command("pixels", sets))
    with pytest.raises(DataError, match=r"and 2 more classes have too few"):
        fewshot.main(command("pixels", sets, "shots=31"))
    (sets[0] / "bee" / "29.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"class 'bee' has 4 readable images"):
        fewshot.main(command("pixels", sets, "shots=5"))
    for path in (sets[0] / "bee").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"train: class 'bee' has no readable images"):
        fewshot.main(command("pixels", sets, "shots=[]"))


def test_mistakes_are_named(sets, folder, tmp_path):
    single = write_images(tmp_path / "single", ["ant"], 20, seed=0)
    with pytest.raises(DataError, match=r"train: .*single class, 'ant'"):
        fewshot.main(command("pixels", (single, sets[1])))
    other = write_images(tmp_path / "other", ["ant", "wasp"], 1, seed=0)
    with pytest.raises(DataError, match=r"classes that the training images lack: wasp"):
        fewshot.main(command("pixels", (sets[0], other)))
    with pytest.raises(CheckpointError, match=r"no backbone at 'runs/none'"):
        fewshot.main(command("runs/none", sets))
    with pytest.raises(ConfigError, match=r"both empty"):
        fewshot.main(command("pixels", sets, "shots=[]", "fractions=[]"))
    for share in ("0%", "101%", "10", "5ep", "some"):
        with pytest.raises(ConfigError, match=r"fractions: expected .*such as '1%'"):
            fewshot.main(command("pixels", sets, f"fractions={share}"))
    for word in ("shots=0", "draws=0", "c=0", "alpha=-1", "classifier=svm", "temperature=0"):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            fewshot.main(command("pixels", sets, word))
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"not finite on the train images"):
        fewshot.main(command(tmp_path / "nan", sets))


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_and_the_errors_of_one(sets, folder, tmp_path):
    """With a broken image; a class that is too small ends both processes with one sentence."""
    (sets[0] / "cat" / "6.png").write_bytes(b"broken")
    argv = command(folder, sets, "shots=[1, 5]", "fractions=20%", "draws=2", "batch_size=4")
    one = run(argv, tmp_path / "one.json")

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    def two_processes(*words):
        return subprocess.run(
            [*launcher, "--nproc_per_node=2", "-m", "eval.fewshot", *argv, *words],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    assert two_processes(f"output={tmp_path / 'two.json'}").returncode == 0
    two = json.loads((tmp_path / "two.json").read_text())
    for key in ("metrics", "draws", "data", "protocol"):
        assert two[key] == one[key]
    failed = two_processes("shots=30")
    assert failed.returncode != 0
    assert "class 'cat' has 29 readable images" in failed.stderr
