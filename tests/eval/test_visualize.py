"""The pictures command on tiny images: files, numbers, page, films, processes, mistakes."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch.nn import functional as F

from dino_kd.data.specs import make_dataset
from dino_kd.data.video import open_video
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.features import FeatureBank, extract_features
from dino_kd.models.attention import cls_attention
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import load_backbone, save_backbone
from eval import visualize
from eval.gallery import nearest
from eval.shown import evenly_spaced, plain, takes_any_size, view_of, view_size
from tests.conftest import BROWSERS

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
QUIET = ["device=cpu", "num_workers=0", "cache=off"]


def write_images(root, count=5, seed=0, classes=()):
    """Noise over a ramp; every second image is upright, the others lie down."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        shape = (24, 36) if i % 2 else (36, 24)
        ramp = np.linspace(0, 120, shape[1])[None, :, None]
        pixels = (rng.integers(0, 100, (*shape, 3)) + ramp).astype(np.uint8)
        folder = root / classes[i % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=24, patch_size=4, args=TINY)
    path = tmp_path_factory.mktemp("network") / "backbone"
    save_backbone(backbone, path)
    return path


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "cnn"
    save_backbone(create_backbone("resnet10t", img_size=64), path)
    return path


def run(backbone, shown, output, *more):
    assert visualize.main([f"backbone={backbone}", f"input={shown}", *QUIET, f"output={output}",
                           *more]) == 0  # fmt: skip
    return json.loads((output / "visualize.json").read_text())


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what the page points to."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.images, self.ids, self.text = [], [], [], set(), ""
        self.tags = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "img":
            self.images.append(attrs)
        self.references += [attrs[name] for name in ("href", "src") if name in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_page(output):
    """Every file that the page names exists, every anchor too, and nothing leads outside."""
    page = Page((output / "index.html").read_text(encoding="utf-8"))
    for reference in page.references:
        if reference.startswith("data:image/"):
            picture = base64.b64decode(reference.partition(",")[2])
            Image.open(io.BytesIO(picture)).verify()
        elif reference.startswith("#"):
            assert reference[1:] in page.ids
        else:
            assert ":" not in reference
            assert (output / urllib.parse.unquote(reference)).is_file(), reference
    assert all(image["alt"] for image in page.images)
    assert "script" not in page.tags
    return page


def test_sheets_page_and_result_are_written(folder, tmp_path, capsys):
    output = tmp_path / "out"
    result = run(folder, write_images(tmp_path / "images"), output)
    names = ["index.html", "attention.png", "pca.png", "similarity.png"]
    assert result["files"] == names
    assert {file.name for file in output.iterdir()} == {*names, "visualize.json"}
    assert result["protocol"]["kinds"] == ["attention", "pca", "similarity"]
    assert result["protocol"]["view_sizes"] == [[36, 24], [24, 36]] * 2 + [[36, 24]]
    assert result["protocol"]["grids"][0] == [9, 6]
    assert result["data"]["input"]["names"] == [f"{i}.png" for i in range(5)]
    page = check_page(output)
    assert result["backbone"]["sha256"] in page.text
    assert result["versions"]["torch"] in page.text
    # image, and map and mask of mean and two heads; image and map for the other two kinds
    assert len(page.images) == 5 * (1 + 2 * 3) + 2 * 5 * 2
    assert str(output / "attention.png") in capsys.readouterr().out


def test_sheets_have_the_size_of_their_pictures(folder, tmp_path):
    """36 x 24 pixels are enlarged 3 times; the caption lines and the margin come on top."""
    output = tmp_path / "out"
    run(folder, write_images(tmp_path / "images", 2), output, "kinds=pca")
    width, height = Image.open(output / "pca.png").size
    assert 2 * 36 * 3 < width < 2 * 36 * 3 + 100
    assert (36 + 24) * 3 < height < (36 + 24) * 3 + 80


def test_area_is_that_of_a_loop_over_sorted_patches(folder, tmp_path):
    images = write_images(tmp_path / "images")
    result = run(folder, images, tmp_path / "out", "keep=0.8", "block=0", "kinds=attention")
    backbone = load_backbone(folder)
    shares = []
    for path in sorted(images.iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None]
        maps = cls_attention(backbone, backbone.preprocess(pixels), 0)[0].flatten(1)
        for head in maps.tolist():
            mass, taken = 0.0, 0
            for value in sorted(head, reverse=True):
                if mass >= 0.8 * sum(head):
                    break
                mass, taken = mass + value, taken + 1
            shares.append(taken / len(head))
    assert result["metrics"]["attention_area"] == pytest.approx(100 * np.mean(shares))


def test_colours_are_fitted_over_all_images_together(folder, tmp_path):
    """Explained variance against scikit-learn on the patches of all five images."""
    images = write_images(tmp_path / "images")
    result = run(folder, images, tmp_path / "out", "kinds=[pca]")
    backbone = load_backbone(folder)
    patches = []
    for path in sorted(images.iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            patches.append(backbone.tokens(backbone.preprocess(pixels)).patches[0].double())
    expected = PCA(n_components=3, svd_solver="full").fit(torch.cat(patches).numpy())
    found = result["metrics"]["pca_variance"]
    assert found == pytest.approx(100 * expected.explained_variance_ratio_.sum(), abs=1e-3)


def brute_force_neighbours(backbone, dataset, k):
    """Cosine of all pairs, the image itself left out."""
    features = extract_features(backbone, dataset, size=backbone.img_size).features
    unit = F.normalize(features, dim=1).numpy()
    found = []
    for i in range(len(unit)):
        cosines = [(float(unit[i] @ unit[j]), j) for j in range(len(unit)) if j != i]
        found.append(sorted(cosines, reverse=True)[:k])
    return found


def test_neighbours_are_those_of_all_pairs(folder, tmp_path):
    images = write_images(tmp_path / "images", 12, classes=["ant", "bee", "cat"])
    output = tmp_path / "out"
    result = run(folder, images, output, f"gallery={images}", "k=3", "max_images=12")
    dataset = make_dataset(str(images))
    expected = brute_force_neighbours(load_backbone(folder), dataset, 3)
    cosines = [cosine for row in expected for cosine, _ in row]
    assert result["metrics"]["neighbour_similarity"] == pytest.approx(np.mean(cosines), abs=1e-5)
    agree = [
        dataset.labels[j] == dataset.labels[i] for i, row in enumerate(expected) for _, j in row
    ]
    assert result["metrics"]["neighbour_agreement"] == pytest.approx(100 * np.mean(agree))
    page = check_page(output)
    first = dataset.class_names[dataset.labels[expected[0][0][1]]]
    assert f"{expected[0][0][0]:.2f}  {first}" in page.text
    assert (output / "neighbours.png").is_file()


class Paths:
    """A data set of which only the paths matter."""

    def __init__(self, paths):
        self.paths = paths

    def path(self, index):
        return self.paths[index]


def test_links_and_repeated_files_are_the_image_itself_and_copies_are_not(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "copy").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    features = torch.eye(3, 4)[[0, 0, 0, 0, 1, 0, 2]]
    names = ["a", "link", "a", "a", "other", "copy", "third"]
    gallery = Paths([str(tmp_path / name) for name in names])
    bank = FeatureBank(features, None, torch.arange(7))
    query = FeatureBank(torch.eye(1, 4), None, torch.tensor([0]))
    found = nearest(query, Paths([str(tmp_path / "a")]), bank, gallery, 2)
    assert [names[near.position] for near in found[0]] == ["copy", "other"]
    assert [near.similarity for near in found[0]] == [1, 0]


def test_a_gallery_smaller_than_k_is_noted(folder, tmp_path):
    images = write_images(tmp_path / "images", 4)
    result = run(folder, images, tmp_path / "out", f"gallery={images}", "k=9", "kinds=neighbours")
    assert "4 images, too few for k = 9" in result["notes"][0]
    assert "neighbour_agreement" not in result["metrics"]  # no classes


def test_a_single_image_is_shown(folder, tmp_path):
    images = write_images(tmp_path / "images", 3)
    result = run(folder, images / "1.png", tmp_path / "out", f"gallery={images}")
    assert result["data"]["input"]["names"] == ["1.png"]
    assert result["metrics"]["neighbour_similarity"] < 0.99999  # not itself


def test_cnns_show_everything_but_attention(cnn, tmp_path, capsys):
    result = run(cnn, write_images(tmp_path / "images"), tmp_path / "out")
    assert result["protocol"]["kinds"] == ["pca", "similarity"]
    assert any(note.startswith("no attention: resnet10t is no ViT") for note in result["notes"])
    assert "no attention" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"kinds: resnet10t is no ViT.*leave attention out"):
        run(cnn, tmp_path / "images", tmp_path / "out", "kinds=[attention, pca]")


def test_few_places_are_noted_and_larger_images_have_more(cnn, tmp_path):
    images = write_images(tmp_path / "images", 1)
    small = run(cnn, images, tmp_path / "out")
    assert small["protocol"]["grids"] == [[3, 2]]
    assert any("3 x 2 places" in note and "image_size" in note for note in small["notes"])
    large = run(cnn, images, tmp_path / "out", "image_size=160")
    assert large["protocol"]["grids"] == [[8, 5]]  # 240 x 160, in steps of 32
    assert large["notes"] == [note for note in large["notes"] if "no attention" in note]


def test_image_size_is_rounded_to_whole_patches():
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY)
    assert view_size(backbone, (300, 450), None) == (32, 48)
    assert view_size(backbone, (450, 300), 100) == (144, 96)
    assert view_size(backbone, (450, 300), (50, 100)) == (48, 96)
    assert view_size(backbone, (10, 1000), 32) == (32, 128)  # at most four times as long
    assert view_size(backbone, (10, 10), 3) == (16, 16)
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, 30:60] = 255  # a square in the middle stays a square
    view = view_of(backbone, image, 32)
    assert view.shape == (3, 32, 96)
    assert abs((view[0, 16] > 128).sum() - 32) <= 1
    assert (view[0, :, 48] > 250).all()


def test_networks_of_one_size_have_their_size():
    mixer = create_backbone("mixer_s32_224", img_size=64)
    assert not takes_any_size(mixer)
    assert view_size(mixer, (300, 450), 500) == (64, 64)


def test_spacing_is_even_and_includes_both_ends():
    assert evenly_spaced(100, 4) == [0, 33, 66, 99]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(5, 1) == [0]


def test_broken_images_are_left_out_and_listed(folder, tmp_path):
    images = write_images(tmp_path / "images", 4)
    (images / "2.png").write_bytes(b"\x89PNG no")
    result = run(folder, images, tmp_path / "out", f"gallery={images}", "k=1")
    assert result["data"]["input"]["images"] == 3
    assert "2.png" in result["data"]["input"]["broken_paths"][0]
    assert result["data"]["gallery"]["broken"] == 1
    for path in images.iterdir():
        path.write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 4 images chosen .* can be read"):
        run(folder, images, tmp_path / "out")
    with pytest.raises(DataError, match=r"input: cannot read .*2\.png: not an image"):
        run(folder, images / "2.png", tmp_path / "out")


def test_hostile_names_stay_text(folder, tmp_path):
    """Markup in file and class names, quotes, bytes that are no UTF-8."""
    images = tmp_path / "<b>&amp;"
    write_images(images / "<i>class", 1)
    (images / "<i>class" / "0.png").rename(images / "<i>class" / "<script>alert(1)<&.jpg")
    write_images(images / '"quoted" onload="x', 1, seed=1)
    raw = os.fsencode(images / "<i>class") + b"/\xff\xfe.png"
    os.link(images / "<i>class" / "<script>alert(1)<&.jpg", raw)
    output = tmp_path / "out"
    run(folder, images, output, f"gallery={images}", "separate=true", "k=2")
    page = check_page(output)
    assert page.tags.isdisjoint({"script", "b", "i"})
    assert "<script>alert(1)<&.jpg" in page.text
    assert '"quoted" onload="x' in page.text
    assert not any("onload" in image for image in page.images)
    assert plain("a\ud800\n\x00b") == "a???b"


def test_separate_pictures_are_files_of_their_own(folder, tmp_path):
    output = tmp_path / "out"
    result = run(folder, write_images(tmp_path / "images", 2), output, "separate=true")
    pictures = {f"pictures/{file.name}" for file in (output / "pictures").iterdir()}
    assert pictures == {name for name in result["files"] if "/" in name}
    assert len(pictures) == 2 * (1 + 2 * 3) + 2 * 2 * 2
    assert Image.open(output / "pictures" / "001_0_attention_head_2_mask.png").size == (24, 36)
    check_page(output)


def test_the_map_alone_shows_nothing_of_the_image(folder, tmp_path):
    """Every patch is one flat block then."""
    images = write_images(tmp_path / "images", 1)
    for overlay, flat in (("true", False), ("false", True)):
        run(folder, images, tmp_path / "out", "separate=true", f"overlay={overlay}")
        picture = np.asarray(Image.open(tmp_path / "out/pictures/001_0_attention_mean.png"))
        blocks = picture.reshape(9, 4, 6, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all() == flat


def test_what_an_earlier_call_wrote_is_replaced_and_other_files_stay(folder, tmp_path):
    images, output = write_images(tmp_path / "images", 2), tmp_path / "out"
    run(folder, images, output, "separate=true")
    (output / "mine.txt").write_text("keep")
    (tmp_path / "outside.png").write_text("keep")
    listed = json.loads((output / "visualize.json").read_text())
    listed["files"] += ["../outside.png", "/etc/hostname", "pictures/../../outside.png"]
    (output / "visualize.json").write_text(json.dumps(listed))
    run(folder, images, output, "kinds=pca")
    assert {file.name for file in output.iterdir() if file.is_file()} == {
        "index.html", "pca.png", "visualize.json", "mine.txt",
    }  # fmt: skip
    assert not list((output / "pictures").iterdir())
    assert (tmp_path / "outside.png").is_file()


@pytest.mark.parametrize("branch", ["teacher", "untrained"])
def test_pictures_of_a_run_go_into_the_run(folder, tmp_path, monkeypatch, branch):
    """untrained would need the run's settings; the place alone is asked for here."""
    run_dir = tmp_path / "run"
    shutil.copytree(folder, run_dir / "backbone")
    (run_dir / "config.yaml").write_text("run_dir: x\n")
    monkeypatch.chdir(tmp_path)
    settings = visualize.VisualizeConfig(backbone=str(run_dir), branch=branch, input="x")
    expected = "visualize" if branch == "teacher" else "visualize_untrained"
    assert visualize.output_folder(settings) == run_dir / expected
    if branch == "teacher":
        images = write_images(tmp_path / "images", 1)
        visualize.main([f"backbone={run_dir}", f"input={images}", *QUIET])
        check_page(run_dir / "visualize")
    other = visualize.VisualizeConfig(backbone=str(folder), input="x")
    assert visualize.output_folder(other) == Path("visualize")


def test_grey_networks_work(tmp_path):
    torch.manual_seed(0)
    grey = create_backbone("vit_tiny_patch16_224", img_size=24, patch_size=4, in_chans=1, args=TINY)
    save_backbone(grey, tmp_path / "grey")
    images = write_images(tmp_path / "images", 2)
    run(tmp_path / "grey", images, tmp_path / "out", f"gallery={images}", "k=1")
    check_page(tmp_path / "out")


def write_animation(path, count=5, size=(48, 32)):
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(count)
    ]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)
    return path


def test_an_animation_becomes_an_animation_beside_its_maps(folder, tmp_path):
    output = tmp_path / "out"
    shown = write_animation(tmp_path / "a.gif")
    result = run(folder, shown, output, "max_images=3", f"gallery={write_images(tmp_path / 'g')}")
    assert result["data"]["input"]["names"] == ["0.00 s", "0.20 s", "0.40 s"]
    film = open_video(output / "film.webp")
    assert film.durations == pytest.approx((0.1,) * 5)
    # 24 px high and 36 wide, three side by side, enlarged to at least 128 px
    assert Image.open(output / "film.webp").size == (3 * 36 * 6, 24 * 6)
    page = check_page(output)
    assert "film.webp" in page.references
    run(folder, shown, output, "frame_step=2", "kinds=attention")
    assert open_video(output / "film.webp").durations == pytest.approx((0.2, 0.2, 0.1))


def test_a_film_becomes_a_film_beside_its_maps(folder, cnn, tmp_path):
    """A stream of 10 frames in, 10 out; a CNN has two pictures side by side instead of three."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for level in range(0, 200, 20):
            frame = np.full((32, 48, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    for backbone, width in ((folder, 3 * 36 * 6), (cnn, 2 * 96 * 2)):
        output = tmp_path / "out"
        result = run(backbone, path, output, "max_images=4", "batch_size=3")
        assert result["data"]["input"]["available"] == 10
        assert result["data"]["input"]["images"] == 4
        with av.open(str(output / "film.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.average_rate) == (width, 8)
            read = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        assert len(read) == 10
        left = [frame[:, : 24 * 2].mean() for frame in read]
        assert left == pytest.approx(range(0, 200, 20), abs=6)
        page = check_page(output)
        assert "film.mp4" in page.references
        assert "video" in page.tags


def test_a_cut_film_leaves_no_output(folder, tmp_path):
    path = write_animation(tmp_path / "a.gif", 20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"input: .*a\.gif is damaged or cut short after"):
        run(folder, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_before_anything_is_written(folder, tmp_path):
    images, output = write_images(tmp_path / "images", 2), tmp_path / "out"
    cases = [
        (folder, ["kinds=neighbours"], r"gallery: neighbours need images"),
        (folder, ["kinds=pca", f"gallery={images}"], r"gallery: .* kinds has no neighbours"),
        (folder, ["kinds=atention"], r"kinds: expected auto, .* got 'atention'"),
        (folder, ["block=2"], r"block: .* has blocks 0 to 1, got 2"),
        (folder, ["keep=1"], r"keep: expected a number > 0 and < 1"),
        (folder, ["point=[0.5, 2]"], r"point: expected \[across, down\]"),
        (folder, ["k=0"], r"k: expected a whole number > 0"),
        ("pixels", [], r"backbone: pixels are no network"),
        ("runs/none", [], r"no backbone at 'runs/none'"),
    ]
    for backbone, more, message in cases:
        with pytest.raises((ConfigError, CheckpointError), match=message):
            run(backbone, images, output, *more)
    assert not output.exists()
    (tmp_path / "words.txt").write_text("nothing\n")
    for shown in ("nowhere", tmp_path / "words.txt", tmp_path / "none.mp4"):
        with pytest.raises(DataError, match=r"^input: "):
            run(folder, shown, output)
    with pytest.raises(DataError, match=r"^gallery: nowhere"):
        run(folder, images, output, "gallery=nowhere")


def test_output_is_a_folder_and_not_one_that_is_read(folder, tmp_path):
    images = write_images(tmp_path / "images", 2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output: .*file is a file"):
        run(folder, images, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"output: .* is the folder that input reads"):
        run(folder, f"folder:{images}", images)
    with pytest.raises(ConfigError, match=r"output: .* is the folder that gallery reads"):
        run(folder, images / "0.png", images, f"gallery={images}")


def test_a_network_that_diverged_is_not_shown(folder, tmp_path):
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match="not finite"):
        run(tmp_path / "nan", write_images(tmp_path / "images", 1), tmp_path / "out")


def test_other_kinds_of_attention_are_left_out(tmp_path):
    torch.manual_seed(0)
    args = {**TINY, "class_token": False, "global_pool": "avg"}
    pooled = create_backbone("vit_tiny_patch16_224", img_size=24, patch_size=4, args=args)
    save_backbone(pooled, tmp_path / "pooled")
    result = run(tmp_path / "pooled", write_images(tmp_path / "images", 2), tmp_path / "out")
    assert result["protocol"]["kinds"] == ["pca", "similarity"]
    assert "no class token" in result["notes"][0]


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_pictures(folder, tmp_path, width):
    """A red image must be red on the screen: the page works from a file, without a network."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (24, 24), (200, 0, 0)).save(images / "red.png")
    run(folder, images, tmp_path / "out", "kinds=pca")
    browser = next(filter(shutil.which, BROWSERS))
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
            f"--screenshot={shot}", (tmp_path / "out" / "index.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    picture = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert picture.shape[1] == width
    red = (abs(picture - (200, 0, 0)) <= 2).all(-1)
    assert red.sum() > 120 * 120


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_write_what_one_writes(folder, tmp_path):
    images = write_images(tmp_path / "images", 9, classes=["ant", "bee", "cat"])
    (images / "cat" / "8.png").write_bytes(b"broken")
    argv = [f"backbone={folder}", f"input={images}", f"gallery={images}", "k=3", *QUIET]
    one = run(folder, images, tmp_path / "one", f"gallery={images}", "k=3")
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "eval.visualize", *argv, f"output={tmp_path / 'two'}",
        ],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )  # fmt: skip
    two = json.loads((tmp_path / "two" / "visualize.json").read_text())
    assert two["processes"] == 2
    # products of other batch sizes round otherwise
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    for key in ("files", "data", "protocol"):
        assert two[key] == one[key]
    for name in one["files"]:
        if name.endswith(".png"):
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_end_with_one_sentence(folder, tmp_path):
    """A mistake that only the main process meets, does not leave the other waiting."""
    images = write_images(tmp_path / "images", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pca.png").mkdir()  # cannot be replaced by a file
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "eval.visualize", f"backbone={folder}", f"input={images}", *QUIET,
            f"output={tmp_path / 'out'}",
        ],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: cannot write" in done.stderr
    assert "eval/visualize.py" not in done.stderr  # no traceback of ours


@pytest.mark.slow
def test_module_runs_as_a_script(folder, tmp_path):
    """Exit codes and plain words, without a traceback."""
    found = subprocess.run(
        [sys.executable, "-m", "eval.visualize", f"backbone={folder}", "input=nowhere", *QUIET],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert found.returncode == 2
    assert "input: nowhere does not exist" in found.stderr
    assert "Traceback" not in found.stderr
