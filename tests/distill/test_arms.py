"""A comparison of arms on tiny JPEGs: what each arm is, the table by hand, resume, refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score

from dino_kd import cli
from dino_kd.config import load_settings
from dino_kd.data.loader import EvalTransform
from dino_kd.data.specs import make_dataset
from dino_kd.data.splits import holdout
from dino_kd.distill import arms as arms_module
from dino_kd.distill import step_cost
from dino_kd.distill.arm_scores import aligned
from dino_kd.distill.arms import (
    Arm,
    arm_settings,
    compare,
    equal_wall_clock,
    training_cost,
    with_arms,
)
from dino_kd.distill.story import distill, prepare
from dino_kd.errors import CheckpointError, ConfigError, DataError, Interrupted, UserError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.linear_head import HeadOrigin, LinearHead, save_linear_head
from dino_kd.pretrained import backbone_hash, save_backbone
from dino_kd.schema import DistillConfig
from dino_kd.tasks.distill import DistillTask
from tests.tiny import read_metrics, write_images

TINY = [
    "device=cpu", "data.num_workers=0", "student.backbone=test_resnet", "student.image_size=32",
    "optim.batch_size=12", "optim.length=2ep", "optim.precision=fp32", "optim.base_lr=0.01",
    "optim.warmup=1ep", "log.log_every=1", "log.tensorboard=false", "fidelity.every=3",
    "recalibrate=24", "data.labels=0.5", "augment.label_smoothing=0",
]  # fmt: skip
ALL = "arms=scratch,scratch_plus,kd,control"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 36, classes=3)


@pytest.fixture(scope="module")
def test_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("test"), 27, classes=3, side=32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A ViT of random weights and its linear head, whose classes stand in another order."""
    root = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    backbone = create_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, args=args, mean=(0.4,) * 3,
        std=(0.3,) * 3,
    ).eval()  # fmt: skip
    save_backbone(backbone, root / "net")
    origin = HeadOrigin("x", backbone_hash(backbone), (32, 32), backbone.mean, backbone.std)
    head = LinearHead(("output",), [24], ["class_2", "other", "class_0", "class_1"], origin)
    save_linear_head(head, root / "head.safetensors")
    return root


@pytest.fixture(scope="module")
def made(images, test_images, teacher):
    """A function from a run directory and further words to settings."""

    def make(run_dir: Path, *more: str) -> DistillConfig:
        base = [
            *TINY, f"data.train={images}", f"data.test={test_images}", f"run_dir={run_dir}",
            f"teacher.backbone={teacher}/net", f"teacher.head={teacher}/head.safetensors",
        ]  # fmt: skip
        given = {word.split("=")[0] for word in more}
        kept = [word for word in base if word.split("=")[0] not in given]
        words = [*kept, *(word for word in more if word != "data.test=none")]
        return load_settings(DistillConfig, words, command="distill")

    return make


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A comparison of all arms with two seeds."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    compare(made(run_dir, ALL, "seeds=0,1"))
    return run_dir


def result_of(run_dir: Path) -> dict:
    (result,) = json.loads((run_dir / "arms.json").read_text())["students"]
    return result


def row(result: dict, arm: str) -> dict:
    return next(one for one in result["rows"] if one["arm"] == arm)


def of_arm(run_dir: Path, arm: str) -> tuple[dict, dict]:
    """Numbers and tensors of one arm."""
    numbers = json.loads((run_dir / arm / "eval" / "distill.json").read_text())
    return numbers, load_file(run_dir / arm / "eval" / "test_logits.safetensors")


def test_scratch_has_the_steps_of_kd_on_the_labelled_images_alone(whole):
    for seed in (0, 1):
        for arm in ("kd", "scratch", "control"):
            assert read_metrics(whole / f"{arm}-seed{seed}")[-1]["step"] == 6, arm
    stored = load_settings(
        DistillConfig, [str(whole / "scratch-seed0" / "config.yaml")], command="distill"
    )
    assert stored.terms.weights() == {"ce": 1.0}
    assert stored.optim.batch_size == 12
    assert stored.optim.warmup == 3  # 1 epoch of kd, which has more images
    log = (whole / "scratch-seed0" / "train.log").read_text()
    assert "18 images, 18 of them with a label" in log
    assert "36 images, 18 of them with a label" in (whole / "kd-seed0" / "train.log").read_text()


def test_scratch_plus_has_smoothed_labels_and_the_time_of_kd(whole):
    known = json.loads((whole / "equal_time.json").read_text())
    costs = known["kd_seconds_per_step"] / known["scratch_seconds_per_step"]
    assert known["ratio"] == pytest.approx(costs, rel=0.5)  # medians of three rounds
    assert known["steps"] == max(1, round(6 * known["ratio"]))
    for seed in (0, 1):
        numbers, _ = of_arm(whole, f"scratch_plus-seed{seed}")
        assert numbers["settings"]["augment"]["label_smoothing"] == 0.1
        assert numbers["training"]["equal_time"] == known
        assert numbers["training"]["steps"] == known["steps"]
    (note,) = result_of(whole)["notes"]  # once for both seeds
    assert f"{known['steps']:,} steps take equal time" in note


def test_equal_time_is_measured_in_turn_and_kept(made, tmp_path, monkeypatch):
    timed = []
    costs = iter([0.30, 0.10, 0.90, 0.30, 0.50, 0.25])  # kd and scratch; the machine gets busy

    def cost(settings, device):
        timed.append((settings.terms.weights(), settings.augment.label_smoothing))
        return next(costs)

    monkeypatch.setattr(step_cost, "median_step", cost)
    settings, device = made(tmp_path / "run"), torch.device("cpu")
    (tmp_path / "run").mkdir()
    span = prepare(settings, device).span
    arm = Arm("scratch_plus", 3, "test_resnet", tmp_path / "run" / "scratch_plus-seed3")
    found = equal_wall_clock(settings, arm, span, device)
    assert found == pytest.approx(
        {"kd_seconds_per_step": 0.5, "scratch_seconds_per_step": 0.25, "ratio": 3.0, "steps": 18}
    )
    assert [set(weights) == {"ce"} for weights, _ in timed] == [False, True] * 3
    assert timed[1][1] == 0.1
    other = Arm("scratch_plus", 4, "test_resnet", tmp_path / "run" / "scratch_plus-seed4")
    assert equal_wall_clock(settings, other, span, device) == found  # no seventh timing


def test_a_timed_step_costs_what_it_does_and_leaves_nothing(made, tmp_path, monkeypatch):
    """A step that is made 40 ms slower takes at least 40 ms; no run directory appears."""
    settings = made(tmp_path / "run", "optim.length=6")
    plain = step_cost.median_step(settings, torch.device("cpu"))
    forward = DistillTask.forward
    monkeypatch.setattr(DistillTask, "forward", lambda *a: time.sleep(0.04) or forward(*a))
    slow = step_cost.median_step(settings, torch.device("cpu"))
    assert slow >= 0.04
    assert slow > plain
    assert not (tmp_path / "run").exists()


def test_the_comparison_of_gradients_is_no_part_of_the_cost(tmp_path):
    rows = [{"step": n + 1, "images_per_s": 100.0} for n in range(3)]
    rows += [{"step": n + 4, "images_per_s": 10.0, "gradient_cosine": 0.5} for n in range(9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert training_cost(tmp_path, 12)["seconds_per_step"] == pytest.approx(0.12)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "images_per_s": None}))
    with pytest.raises(DataError, match="holds no speed"):
        training_cost(tmp_path, 12)


def test_the_control_teacher_is_the_same_network_with_other_weights(made, tmp_path):
    ours, control = (
        prepare(made(tmp_path / "run"), torch.device("cpu"), control=is_control).teachers[0]
        for is_control in (False, True)
    )
    assert str(ours) == str(control)
    for (name, a), b in zip(
        ours.named_parameters(), (p for _, p in control.named_parameters()), strict=True
    ):
        assert a.shape == b.shape
        if a.squeeze().ndim > 1:
            both = torch.stack([a.flatten(), b.flatten()])
            assert torch.corrcoef(both)[0, 1].abs() < 0.3, name
    pixels = torch.rand(4, 3, 32, 32) * 255
    a, b = (one.answers(pixels, ["logits"])["logits"] for one in (ours, control))
    assert (a - b).abs().max() > 0.1 * a.abs().max()


def test_only_the_control_arm_has_a_control_teacher(whole):
    told = {arm: (whole / f"{arm}-seed0" / "train.log").read_text() for arm in ("kd", "control")}
    assert "teacher: control of" in told["control"]
    assert "control of" not in told["kd"]


@pytest.mark.parametrize("arm", ["scratch", "scratch_plus", "kd", "control"])
def test_the_row_of_an_arm_by_hand(whole, arm):
    result = result_of(whole)
    target = load_file(whole / "teacher" / "eval" / "test_logits.safetensors")
    top1, agreement, kl = [], [], []
    for seed in (0, 1):
        numbers, tensors = of_arm(whole, f"{arm}-seed{seed}")
        logits, labels = tensors["logits"].double().numpy(), tensors["labels"].numpy()
        top1.append(100 * accuracy_score(labels, logits.argmax(1)))
        theirs = target["logits"].double().numpy()
        agreement.append(100 * accuracy_score(theirs.argmax(1), logits.argmax(1)))
        ours, its = log_softmax(logits, 1), log_softmax(theirs, 1)
        kl.append((np.exp(its) * (its - ours)).sum(1).mean())
        assert numbers["metrics"]["top1"] == pytest.approx(top1[-1])
    found = row(result, arm)
    assert found["top1"]["value"] == pytest.approx(np.mean(top1))
    assert found["top1"]["low"] <= found["top1"]["value"] <= found["top1"]["high"]
    assert found["agreement"] == pytest.approx(np.mean(agreement))
    assert found["kl"] == pytest.approx(np.mean(kl), abs=1e-3)  # logits are kept in fp16


def test_differences_and_the_gap_by_hand(whole):
    result = result_of(whole)
    hits = {}
    for arm in ("scratch", "scratch_plus", "kd", "control"):
        kept = [of_arm(whole, f"{arm}-seed{seed}")[1] for seed in (0, 1)]
        hits[arm] = np.stack([(t["logits"].argmax(1) == t["labels"]).numpy() for t in kept])
    for other in ("scratch", "scratch_plus", "control"):
        expected = 100 * (hits["kd"].mean() - hits[other].mean())
        assert result["differences"][other]["points"] == pytest.approx(expected)
    noise = 100 * abs(hits["scratch"][0].mean() - hits["scratch"][1].mean())
    assert result["seed_noise"]["difference"] == pytest.approx(noise)
    top = {arm: row(result, arm)["top1"]["value"] for arm in ("teacher", "scratch", "kd")}
    gap = top["teacher"] - top["scratch"]
    expected = None if gap < 1 else (top["kd"] - top["scratch"]) / gap
    assert result["gap_recovered"] == pytest.approx(expected)


def test_logits_and_neighbours_come_from_the_shipped_files(whole, images, test_images):
    """timm's own network, brute force over pixels and neighbours."""
    arm = whole / "kd-seed1"
    net = timm.create_model(f"local-dir:{arm / 'backbone'}", pretrained=True).eval()
    norm = net.pretrained_cfg

    def features(spec: Path, chosen: np.ndarray) -> torch.Tensor:
        data, view = make_dataset(str(spec), where="x"), EvalTransform((32, 32), 32)
        pixels = (
            torch.stack([torch.from_numpy(view(data.read(int(i))).copy()) for i in chosen]) / 255
        )
        mean, std = (torch.tensor(norm[key])[:, None, None] for key in ("mean", "std"))
        with torch.no_grad():
            x = net.forward_features((pixels - mean) / std)
            return net.forward_head(x, pre_logits=True)

    labels = np.asarray(make_dataset(str(images), where="x").labels)
    truth = np.asarray(make_dataset(str(test_images), where="x").labels)
    voters, _ = holdout(labels, 0.5, 0)
    seen, bank = features(test_images, np.arange(27)), features(images, voters)
    layer = load_file(arm / "classifier.safetensors")
    numbers, tensors = of_arm(whole, "kd-seed1")
    expected = seen @ layer["weight"].T + layer["bias"]
    torch.testing.assert_close(tensors["logits"].float(), expected, rtol=2e-3, atol=2e-3)

    cosine = torch.nn.functional.cosine_similarity(seen[:, None], bank[None], dim=2).double()
    right = 0
    for near, label in zip(cosine.numpy(), truth, strict=True):
        votes = np.zeros(3)
        for place in np.argsort(-near)[:20]:  # all 18, when there are fewer
            votes[labels[voters[place]]] += np.exp(near[place] / 0.07)
        right += votes.argmax() == label
    assert numbers["metrics"]["knn20_top1"] == pytest.approx(100 * right / 27)
    assert tensors["knn_hits"].sum() == right


def test_the_teacher_is_the_first_row_and_its_classes_are_in_order(whole, teacher, test_images):
    numbers, tensors = of_arm(whole, "teacher")
    head = load_file(teacher / "head.safetensors")
    net = timm.create_model(f"local-dir:{teacher / 'net'}", pretrained=True).eval()
    data, view = make_dataset(str(test_images), where="x"), EvalTransform((32, 32), 32)
    pixels = torch.stack([torch.from_numpy(view(data.read(i)).copy()) for i in range(27)])
    with torch.no_grad():
        x = net.forward_head(net.forward_features((pixels / 255 - 0.4) / 0.3), pre_logits=True)
    expected = (x @ head["weight"].T + head["bias"])[:, [2, 3, 0]]  # class_0, class_1, class_2
    torch.testing.assert_close(tensors["logits"].float(), expected, rtol=2e-3, atol=2e-3)
    top1 = 100 * accuracy_score(data.labels, expected.argmax(1))
    first = result_of(whole)["rows"][0]
    assert first["arm"] == "teacher"
    assert first["top1"]["value"] == pytest.approx(top1) == numbers["metrics"]["top1"]


def test_the_table_shows_the_numbers_of_the_file(whole):
    result, page = result_of(whole), (whole / "arms.md").read_text()
    for arm in ("teacher", "scratch", "scratch_plus", "kd", "control"):
        (line,) = [one for one in page.splitlines() if one.startswith(f"| {arm} |")]
        assert f"{row(result, arm)['top1']['value']:.2f}" in line
        assert f"| {row(result, arm)['knn20_top1']:.2f} |" in line
    assert result["verdict"]["sentence"] in page
    assert (whole / "train.log").read_text().count(result["verdict"]["sentence"]) == 1


def test_resume_auto_trains_nothing_again(whole, made, monkeypatch):
    before = (whole / "arms.json").read_text()

    def fail(*args, **kwargs):
        raise AssertionError("a finished arm was trained again")

    monkeypatch.setattr(arms_module, "distill", fail)
    compare(made(whole, ALL, "seeds=0,1", "resume=auto"))
    assert (whole / "arms.json").read_text() == before
    with pytest.raises(ConfigError, match="already holds a run"):
        compare(made(whole, ALL, "seeds=0,1"))


def test_an_arm_whose_score_is_missing_is_finished_alike(whole, made):
    before = result_of(whole)
    (whole / "kd-seed1" / "eval" / "distill.json").unlink()
    compare(made(whole, ALL, "seeds=0,1", "resume=auto"))
    assert result_of(whole) == before


def test_an_interrupted_comparison_goes_on_to_the_same_result(whole, made, tmp_path, monkeypatch):
    calls = []

    def interrupted(settings, *, control=False):
        calls.append(control)
        if len(calls) == 2:
            raise Interrupted("stopped after step 2: SIGTERM")
        return distill(settings, control=control)

    words = ("arms=kd,control", "seeds=0,1")
    monkeypatch.setattr(arms_module, "distill", interrupted)
    with pytest.raises(Interrupted, match=f"the whole comparison: dino-kd distill {tmp_path}"):
        compare(made(tmp_path / "run", *words))
    monkeypatch.setattr(arms_module, "distill", distill)
    compare(made(tmp_path / "run", *words, "resume=auto"))
    ours, reference = result_of(tmp_path / "run"), result_of(whole)
    for arm in ("teacher", "kd", "control"):
        same = ("top1", "knn20_top1", "agreement", "kl", "steps")
        assert {k: row(ours, arm)[k] for k in same} == {k: row(reference, arm)[k] for k in same}
    assert ours["differences"]["control"] == reference["differences"]["control"]


def test_other_test_images_are_scored_without_training(made, images, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    compare(made(run_dir, "arms=kd", "optim.length=1", "optim.warmup=0"))
    assert result_of(run_dir)["differences"] == {}
    assert result_of(run_dir)["verdict"] is None
    monkeypatch.setattr(arms_module, "distill", lambda *a, **k: pytest.fail("trained again"))
    words = ["arms=kd", "optim.length=1", "optim.warmup=0", "resume=auto"]
    compare(made(run_dir, *words, f"data.test={images}"))
    assert result_of(run_dir)["test_images"] == 36


def test_several_students_have_folders_of_their_own(made, tmp_path):
    words = [
        "students=test_resnet,test_efficientnet",
        "arms=kd",
        "optim.length=1",
        "optim.warmup=0",
    ]
    lines = compare(made(tmp_path / "run", *words, "seed=5"))
    results = json.loads((tmp_path / "run" / "arms.json").read_text())["students"]
    assert [one["student"] for one in results] == ["test_resnet", "test_efficientnet"]
    for student in ("test_resnet", "test_efficientnet"):
        numbers, _ = of_arm(tmp_path / "run" / student, "kd-seed5")
        assert numbers["backbone"]["architecture"] == student
        assert any(line.startswith(f"{student}: 27 test images, seeds 5") for line in lines)


def test_without_labels_neighbours_decide_between_kd_and_control(made, tmp_path):
    words = ["arms=kd,control", "terms.preset=label_free", "terms.cosine_kd.hidden_dim=16"]
    run_dir = tmp_path / "run"
    compare(made(run_dir, *words, "optim.length=2", "optim.warmup=0", "data.labels=0"))
    result = result_of(run_dir)
    assert result["measure"] == "knn20_top1"
    hits = [of_arm(run_dir, f"{arm}-seed0")[1]["knn_hits"].double() for arm in ("kd", "control")]
    expected = 100 * float(hits[0].mean() - hits[1].mean())
    assert result["differences"]["control"]["points"] == pytest.approx(expected)
    assert result["verdict"]["name"] in ("KNOWLEDGE", "NOT-KNOWLEDGE", "HURTS")
    numbers, tensors = of_arm(run_dir, "kd-seed0")
    assert "logits" not in tensors
    assert "top1" not in numbers["metrics"]
    assert row(result, "teacher")["top1"] is not None  # its head is there, though no term reads it


def test_unlabelled_training_images_leave_the_votes_to_the_test_images(made, images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(images.glob("*/*.jpg"))):
        (flat / f"{number}.jpg").write_bytes(path.read_bytes())
    words = ["arms=kd,control", "terms.preset=label_free", "terms.cosine_kd.hidden_dim=16"]
    words += [f"data.train={flat}", "data.labels=auto", "optim.length=1", "optim.warmup=0"]
    compare(made(tmp_path / "run", *words))
    numbers, _ = of_arm(tmp_path / "run", "kd-seed0")
    assert numbers["protocol"]["voters"] == "the other test images"


REFUSALS = {
    "no test images": ([ALL, "data.test=none"], "data.test: the arms are compared"),
    "scratch without labels": (
        ["arms=scratch,kd", "terms.preset=label_free"], "arms: scratch learns from labels alone",
    ),
    "no label used": (["arms=scratch,kd", "data.labels=0"], "data.labels=0, but terms.ce"),
    "scratch_plus without kd": (["arms=scratch,scratch_plus"], "is read beside scratch; add kd"),
    "nothing to learn from the teacher": (
        ["arms=kd,scratch", "terms.preset=none", "terms.ce.weight=1"], "only ce is on",
    ),
    "too few labelled images for a batch": (
        [ALL, "data.labels=0.2"], "arm scratch of test_resnet: .*fewer than optim.batch_size=12",
    ),
    "a student that is unknown": (
        ["students=test_resnet,resnet81", "arms=kd"], "arm kd of resnet81: .*resnet81",
    ),
    "a term that the student cannot serve": (
        ["arms=kd", "terms.token_kd.weight=1"], "arm kd of test_resnet: .*distillation token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSALS)
def test_what_proves_nothing_is_refused_before_anything_trains(made, tmp_path, monkeypatch, why):
    words, sentence = REFUSALS[why]
    monkeypatch.setattr(arms_module, "distill", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(UserError, match=f"(?s){sentence}"):
        compare(made(tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


def test_all_refusals_come_at_once(made, tmp_path):
    words = ["arms=scratch,scratch_plus", "data.test=none", "terms.preset=label_free"]
    with pytest.raises(ConfigError) as refused:
        compare(made(tmp_path / "run", *words))
    assert all(word in str(refused.value) for word in ("data.test:", "labels alone", "add kd"))


def test_an_unknown_arm_is_refused_by_the_settings(made, tmp_path, capsys):
    assert cli.main(["distill", "arms=kd,kid", "teacher.backbone=x", "run_dir=y"]) != 0
    assert "arms" in capsys.readouterr().err


def test_equal_time_needs_the_live_teacher(made, tmp_path):
    settings = made(tmp_path / "run", ALL, f"cache={tmp_path / 'cache'}", "seed=4")
    assert with_arms(settings).cache == "off"
    assert with_arms(settings).seeds == [4]
    alone = made(tmp_path / "run", "arms=kd", f"cache={tmp_path / 'cache'}", "seeds=1,1,2")
    assert with_arms(alone).cache == str(tmp_path / "cache")
    assert with_arms(alone).seeds == [1, 2]


def test_smoothing_that_was_asked_for_stays(made, tmp_path):
    settings = made(tmp_path / "run", ALL, "augment.label_smoothing=0.3")
    span = prepare(settings, torch.device("cpu")).span
    arm = Arm("scratch_plus", 0, "test_resnet", tmp_path / "run" / "scratch_plus-seed0")
    assert arm_settings(settings, arm, span, 9).augment.label_smoothing == 0.3


def test_class_scores_are_put_in_order_or_left_out():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    found = aligned(logits, ["c", "a", "b"], ["a", "b"])
    assert found is not None
    assert found.tolist() == [[2.0, 3.0]]
    assert aligned(logits, ["c", "a", "b"], ["a", "z"]) is None
    assert aligned(logits, None, ["a"]) is None
    with pytest.raises(CheckpointError, match="not finite"):
        aligned(torch.tensor([[float("nan")]]), ["a"], ["a"])
