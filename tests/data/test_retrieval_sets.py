"""Official folders are read as they are; anything else is told apart in one sentence."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from dino_kd.data.image_files import ImageFiles
from dino_kd.data.images import BrokenImage
from dino_kd.data.retrieval_sets import find_revisited, read_copydays, read_revisited
from dino_kd.errors import DataError


def write_picture(path, size=(12, 8), colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def truth(**changes):
    entry = {
        "bbx": [1.0, 2.0, 9.4, 7.6],
        "easy": np.array([0]),
        "hard": np.array([1, 2]),
        "junk": np.array([], dtype=np.int64),
    }
    return {
        "imlist": ["all_souls_000013", "christ_church_000179", "oxford_002734"],
        "qimlist": ["all_souls_000026"],
        "gnd": [{**entry, **changes}],
    }


def write_revisited(root, data=None, name="roxford5k"):
    data = truth() if data is None else data
    for image in ["all_souls_000013", "christ_church_000179", "oxford_002734", "all_souls_000026"]:
        write_picture(root / name / "jpg" / f"{image}.jpg")
    written = data if isinstance(data, bytes) else pickle.dumps(data, protocol=2)
    (root / name / f"gnd_{name}.pkl").write_bytes(written)
    return root


def test_revisited_set_is_read(tmp_path):
    root = write_revisited(tmp_path)
    assert find_revisited(root, "root") == ["roxford5k"]
    found = read_revisited(root, "roxford5k", "root")
    assert [p.name for p in found.images][1] == "christ_church_000179.jpg"
    assert found.queries == [root / "roxford5k" / "jpg" / "all_souls_000026.jpg"]
    assert found.boxes == [(1.0, 2.0, 9.4, 7.6)]
    expected = {"easy": ([0], [1, 2]), "medium": ([0, 1, 2], []), "hard": ([1, 2], [0])}
    for protocol, (positives, ignored) in expected.items():
        good, hidden = found.positives_and_ignored(0, protocol)
        assert (good.tolist(), hidden.tolist()) == (positives, ignored)


def test_queries_are_cut_as_pillow_does(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    box = (2.5, 3.4, 17.6, 12.5)
    found = ImageFiles([path], spec="x", boxes=[box]).read(0)
    assert np.array_equal(found, np.asarray(Image.fromarray(pixels).crop(box)))
    beyond = ImageFiles([path], spec="x", boxes=[(-5.0, 10.0, 500.0, 30.0)]).read(0)
    assert np.array_equal(beyond, pixels[10:])
    with pytest.raises(BrokenImage, match=r"box .* lies outside of its 30 x 20 px"):
        ImageFiles([path], spec="x", boxes=[(40.0, 0.0, 50.0, 9.0)]).read(0)
    fingerprints = {
        ImageFiles([path], spec="x", boxes=boxes).fingerprint() for boxes in (None, [box])
    }
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps(truth())[:60], "is no complete pickle file"),
        ([1, 2], r"a dict with imlist, qimlist, gnd; found <class 'list'>"),
        ({"imlist": []}, r"found keys \['imlist'\]"),
        ({**truth(), "imlist": []}, r"imlist should be names .*found 'none'"),
        ({**truth(), "qimlist": ["../../etc/passwd"]}, r"qimlist should be .*'../../etc/passwd'"),
        ({**truth(), "imlist": [7]}, r"imlist should be names .*found 7"),
        ({**truth(), "gnd": []}, r"one dict for each of the 1 queries; found 0"),
        (truth(easy=[3]), r"gnd\[0\]\['easy'\] should be whole numbers from 0 to 2.*\[3\]"),
        (truth(hard=[-1]), r"'hard'.*found \[-1\]"),
        (truth(junk=[0.5]), r"'junk'.*found \[0.5\]"),
        (truth(junk="ab"), r"'junk'.*found ab"),
        (truth(bbx=[5, 5, 1, 9]), r"gnd\[0\]\['bbx'\] should be left, top, right, bottom"),
        (truth(bbx=[5, 5, 9]), r"'bbx'.*found \[5, 5, 9\]"),
    ],
)
def test_other_ground_truth_is_told_apart(tmp_path, data, words):
    write_revisited(tmp_path, data)
    with pytest.raises(DataError, match=rf"(?s)root: .*gnd_roxford5k\.pkl.*{words}"):
        read_revisited(tmp_path, "roxford5k", "root")


def test_missing_keys_of_a_query_are_named(tmp_path):
    data = truth()
    del data["gnd"][0]["junk"]
    write_revisited(tmp_path, data)
    with pytest.raises(DataError, match=r"'junk'\] should be .*found nothing"):
        read_revisited(tmp_path, "roxford5k", "root")


def test_missing_pieces_of_a_revisited_set_are_named(tmp_path):
    root = write_revisited(tmp_path)
    (root / "roxford5k" / "jpg" / "oxford_002734.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images that .*pkl names are missing.*oxford_0027"):
        read_revisited(root, "roxford5k", "root")
    (root / "roxford5k" / "gnd_roxford5k.pkl").unlink()
    with pytest.raises(DataError, match=r"lacks gnd_roxford5k.pkl \(found jpg/\). Expected: ROOT/"):
        read_revisited(root, "roxford5k", "root")
    with pytest.raises(DataError, match=r"lacks gnd_rparis6k.pkl \(.* is no folder\)"):
        read_revisited(root, "rparis6k", "root")
    with pytest.raises(DataError, match=r"is one of the sets; give the folder above"):
        find_revisited(root / "roxford5k", "root")
    (tmp_path / "cats").mkdir()
    write_picture(tmp_path / "cats" / "1.jpg")
    with pytest.raises(DataError, match=r"neither roxford5k nor rparis6k .*\(found 1.jpg\)"):
        find_revisited(tmp_path / "cats", "root")
    with pytest.raises(DataError, match=r"nowhere is no folder. Expected"):
        find_revisited(tmp_path / "nowhere", "root")


def write_copydays(root, jpeg="jpegqual"):
    for i in range(3):
        write_picture(root / "original" / f"200{i}00.jpg")
        write_picture(root / "crops" / "80" / f"200{i}01.jpg")
        write_picture(root / "crops" / "10" / f"200{i}01.jpg")
        write_picture(root / jpeg / "3" / f"200{i}01.jpg")
    for name in ("200001", "200002", "200201"):
        write_picture(root / "strong" / f"{name}.jpg")
    return root


@pytest.mark.parametrize("jpeg", ["jpegqual", "jpeg"])
def test_copydays_is_read(tmp_path, jpeg):
    found = read_copydays(write_copydays(tmp_path, jpeg), "root")
    assert [p.name for p in found.originals] == ["200000.jpg", "200100.jpg", "200200.jpg"]
    assert list(found.attacks) == ["strong", "crops/10", "crops/80", "jpeg/3"]
    assert [p.tolist() for p in found.positives["strong"]] == [[0], [0], [2]]
    assert [p.tolist() for p in found.positives["jpeg/3"]] == [[0], [1], [2]]


def test_missing_pieces_of_copydays_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"no .*original \(.*nowhere is no folder\). Expected: ROOT"
    ):
        read_copydays(tmp_path / "nowhere", "root")
    write_picture(tmp_path / "folder" / "a.jpg")
    with pytest.raises(DataError, match=r"there is no .*original \(found a.jpg\)"):
        read_copydays(tmp_path / "folder", "root")
    (tmp_path / "empty" / "original").mkdir(parents=True)
    with pytest.raises(DataError, match=r"original holds no image \(found nothing in it\)"):
        read_copydays(tmp_path / "empty", "root")
    write_picture(tmp_path / "alone" / "original" / "200000.jpg")
    with pytest.raises(DataError, match=r"originals but no altered copies \(found original/\)"):
        read_copydays(tmp_path / "alone", "root")
    write_picture(tmp_path / "alone" / "strong" / "300001.jpg")
    with pytest.raises(DataError, match=r"belongs to no original: none is named 3000"):
        read_copydays(tmp_path / "alone", "root")
    write_picture(tmp_path / "alone" / "strong" / "cat.jpg")
    with pytest.raises(DataError, match=r"cat.jpg is not named as in Copydays, by six digits"):
        read_copydays(tmp_path / "alone", "root")
