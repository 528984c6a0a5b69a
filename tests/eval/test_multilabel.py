"""Images with several labels: the file, the metrics against scikit-learn, the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from dino_kd.data.specs import make_dataset
from dino_kd.errors import DataError
from dino_kd.features import pixel_features
from eval import knn, multilabel
from tests.eval.test_knn import QUIET, write_images


@pytest.fixture
def photos(tmp_path):
    """Two flat folders, and labels: the colour of the image, and whether its number is even."""
    lines = ["path,labels"]
    for name, count, seed in (("train", 12, 0), ("test", 7, 1)):
        made = write_images(tmp_path / "made", ["red", "green", "blue"], count, seed)
        (tmp_path / name).mkdir()
        for path in sorted(made.rglob("*.png")):
            target = tmp_path / name / f"{path.parent.name}{path.name}"
            path.rename(target)
            even = "|even" if int(path.stem) % 2 == 0 else ""
            lines.append(f"{name}/{target.name},{path.parent.name}{even}")
        shutil.rmtree(made)
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def command(file, *more):
    folder = file.parent
    words = ["backbone=pixels", f"train={folder / 'train'}", f"labels={file}", *QUIET]
    return [*words, f"output={folder / 'result.json'}", *more]


def run(file, *more):
    assert knn.main(command(file, *more)) == 0
    return json.loads((file.parent / "result.json").read_text())


def by_hand(bank, queries, bank_labels, k):
    """float64 [Q, L]: weighted mean of the label vectors of the k nearest, by numpy."""
    x, q = (v / np.linalg.norm(v, axis=1)[:, None] for v in (bank, queries))
    cosine = q @ x.T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    weights = np.exp(np.take_along_axis(cosine, near, 1) / 0.07)
    return np.stack(
        [(w[:, None] * bank_labels[n]).sum(0) / w.sum() for w, n in zip(weights, near, strict=True)]
    )


def truth_of(dataset):
    names = ["blue", "even", "green", "red"]
    having = np.zeros((len(dataset), 4), dtype=bool)
    for i in range(len(dataset)):
        stem = dataset.path(i).rpartition("/")[2].removesuffix(".png")
        colour = stem.rstrip("0123456789")
        having[i, names.index(colour)] = True
        having[i, 1] = int(stem.removeprefix(colour)) % 2 == 0
    return having


def test_numbers_are_those_of_numpy_and_scikit_learn(photos, capsys):
    result = run(photos, f"test={photos.parent / 'test'}", "k=[1, 5, 99]")
    sets = [make_dataset(str(photos.parent / name)) for name in ("train", "test")]
    bank, queries = (pixel_features(s, size=32).features.double().numpy() for s in sets)
    truth = truth_of(sets[1])
    for k, used in ((1, 1), (5, 5), (99, 36)):
        scores = by_hand(bank, queries, truth_of(sets[0]), used)
        expected = 100 * average_precision_score(truth, scores, average="macro")
        assert result["metrics"][f"knn{k}_map"] == pytest.approx(expected, abs=1e-6)
        expected = 100 * f1_score(truth, scores >= 0.5, average="micro")
        assert result["metrics"][f"knn{k}_micro_f1"] == pytest.approx(expected)
    assert result["protocol"]["labels"] == 4
    printed = capsys.readouterr().out
    assert "21 test images, 36 vote, 4 labels" in printed
    assert "mAP %" in printed
    assert "only 36 images vote, fewer than k = 99" in printed
    assert knn.headline(result)[0][0] == "k-NN mAP %, k = 5"


def test_each_image_is_scored_by_the_others(photos):
    result = run(photos, "leave_one_out=true", "k=5")
    images = make_dataset(str(photos.parent / "train"))
    features, truth = pixel_features(images, size=32).features.double().numpy(), truth_of(images)
    scores = np.concatenate(
        [
            by_hand(np.delete(features, i, 0), features[i : i + 1], np.delete(truth, i, 0), 5)
            for i in range(36)
        ]
    )
    expected = 100 * average_precision_score(truth, scores, average="macro")
    assert result["metrics"]["knn5_map"] == pytest.approx(expected, abs=1e-6)
    assert knn.headline(result)[0][0] == "k-NN mAP %, k = 5, leave one out"


def test_broken_images_keep_the_labels_in_step(photos):
    """The first image broken, in both sets: as if it were not there."""
    test = f"test={photos.parent / 'test'}"
    for name in ("train", "test"):
        (photos.parent / name / "blue0.png").write_bytes(b"broken")
    broken = run(photos, test, "k=5")
    for name in ("train", "test"):
        (photos.parent / name / "blue0.png").unlink()
    assert run(photos, test, "k=5")["metrics"] == broken["metrics"]


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_equals_scikit_learn(levels):
    """With many equal scores and with hardly any."""
    rng = np.random.default_rng(levels)
    for _ in range(30):
        truth, scores = rng.random(40) < 0.3, rng.integers(levels, size=40) / levels
        truth[3] = True
        expected = average_precision_score(truth, scores)
        assert multilabel.average_precision(truth, scores) == pytest.approx(expected)


def test_labels_without_a_positive_image_do_not_count():
    truth = np.array([[True, False], [False, False]])
    scores = np.array([[0.2, 0.9], [0.8, 0.1]])
    assert multilabel.mean_average_precision(truth, scores) == 0.5


def test_micro_f1_by_hand():
    truth = np.array([[True, False], [True, True]])
    assert multilabel.micro_f1(truth, np.array([[True, True], [False, False]])) == 2 / 5
    assert multilabel.micro_f1(~truth & truth, ~truth & truth) == 0.0


def test_the_file_is_read_as_described(tmp_path):
    """Heading, relative and absolute paths, a comma in a path, an image without labels."""
    file = tmp_path / "l.csv"
    file.write_text(f'path,labels\na/../b.png,dog | cat\n{tmp_path}/c.png,\n\n"d,1.png",dog\n')
    found = multilabel.read_labels(str(file))
    assert found.names == ["cat", "dog"]
    assert found.rows == {
        f"{tmp_path}/b.png": [1, 0],
        f"{tmp_path}/c.png": [],
        f"{tmp_path}/d,1.png": [1],
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no label"),
        ("a.png,\n", "names no label"),
        ("a.png,dog\nb.png\n", r"line 2: expected 'path,label1\|label2', got 'b.png'"),
        ("a.png,dog,cat\n", r"line 1: expected .*got 'a.png,dog,cat'"),
        (",dog\n", r"line 1: expected"),
        ("a.png,dog||cat\n", r"line 1: an empty label in 'dog\|\|cat'"),
        ("a.png,dog\nb/../a.png,cat\n", r"line 2: .*a.png stands there twice"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, sentence):
    file = tmp_path / "l.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=sentence):
        multilabel.read_labels(str(file))


def test_images_without_a_line_are_named(photos):
    lines = photos.read_text().splitlines()
    test = f"test={photos.parent / 'test'}"
    photos.write_text("\n".join(line for line in lines if "test/blue" not in line))
    with pytest.raises(DataError, match=r"lacks 7 of the 21 images of test: .*test/blue0.png"):
        knn.main(command(photos, test))
    photos.write_text("\n".join(line for line in lines if "train/red3" not in line))
    with pytest.raises(DataError, match=r"lacks 1 of the 36 images of train: .*red3.png"):
        knn.main(command(photos, test))


def test_labels_of_one_side_are_noted(photos):
    text = photos.read_text().replace("test/red0.png,red", "test/red0.png,red|rare")
    photos.write_text(text.replace("train/red0.png,red", "train/red0.png,red|only"))
    notes = run(photos, f"test={photos.parent / 'test'}", "k=1")["notes"]
    assert notes == [
        "1 labels have no scored image and are left out of mAP: only",
        "1 labels have no image that votes, so they are never predicted: rare",
    ]


def test_scored_images_need_a_label(photos):
    lines = [
        line.partition(",")[0] + "," if line.startswith("test/") else line
        for line in photos.read_text().splitlines()
    ]
    photos.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"gives no label to any image that is scored"):
        knn.main(command(photos, f"test={photos.parent / 'test'}"))


def test_matrix_follows_the_order_of_the_images(photos):
    dataset = make_dataset(str(photos.parent / "test"))
    found = multilabel.read_labels(str(photos)).matrix(dataset, "test")
    assert found.dtype == torch.bool
    assert found.numpy().tolist() == truth_of(dataset).tolist()
