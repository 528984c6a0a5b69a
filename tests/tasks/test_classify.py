"""Classification: a step against plain torch, mixing by hand, places by sorting."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dino_kd.data.loader import CropBatch
from dino_kd.data.multicrop import Crops
from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, scaled_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.models.backbone import create_backbone
from dino_kd.tasks.classify import ClassifyTask, LabelledImages, Mixing, class_places


def make_task(name="vit_tiny_patch16_224", **more):
    torch.manual_seed(0)
    is_vit = name.startswith("vit")
    backbone = create_backbone(
        name,
        img_size=16,
        patch_size=8 if is_vit else None,
        args={"depth": 2, "embed_dim": 24, "num_heads": 2} if is_vit else None,
    )
    return ClassifyTask(backbone, 3, **more)


def make_batch(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.randint(0, 3, (count,), generator=generator))


def train(task, batches, *, decay=1.0, accumulate=1, seed=0):
    class Quiet:
        numbers = warn = progress = staticmethod(lambda *a: None)

    optimizer = make_optimizer("adamw", scaled_groups(task, task.lr_scales(decay)))
    fit(
        task,
        iter(batches),
        optimizer,
        {"lr": lambda s: 1e-3 * (s + 1), "weight_decay": lambda s: 0.05},
        FitOptions(
            len(batches), 8, torch.device("cpu"), accumulate=accumulate, clip_grad=0.5, seed=seed
        ),
        progress=Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=Quiet(),
        save=lambda p: None,
        stop=StopFlag(),
    )
    return task


# --- the step


def test_three_steps_equal_a_plain_torch_loop():
    """AdamW with a learning rate of its own for every parameter, label smoothing, clipping."""
    task = make_task(label_smoothing=0.1)
    reference = copy.deepcopy(task)
    batches = [make_batch(seed=s) for s in range(3)]
    train(task, batches, decay=0.5)

    scale = {"classifier": 1, "norm": 1 / 2, "blocks.1": 1 / 2, "blocks.0": 1 / 4}
    no_decay = ("bias", "norm", "cls_token", "pos_embed")
    groups = []
    for name, parameter in reference.named_parameters():
        inner = name.removeprefix("backbone.net.")
        factor = next((s for start, s in scale.items() if inner.startswith(start)), 1 / 8)
        decay = 0.0 if any(word in name for word in no_decay) else 0.05
        groups.append({"params": [parameter], "factor": factor, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) * group["factor"]
        images = (batch.images / 255 - mean) / std
        logits = reference.classifier(reference.backbone.net(images))
        F.cross_entropy(logits, batch.labels, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    start = make_task().state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
        if name.endswith("weight"):
            assert not torch.equal(value, start[name]), name


def test_a_batch_of_8_equals_4_micro_batches_of_2():
    batches = [make_batch(seed=s) for s in range(2)]
    whole = train(make_task(), batches)
    split = train(make_task(), batches, accumulate=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_a_skipped_step_leaves_batch_norm_as_it_was():
    task = make_task("resnet18_cifar")
    before = copy.deepcopy(task.state_dict())
    task(make_batch(), {})
    task.after_step({}, skipped=True)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_metrics_are_made_only_when_they_are_logged():
    task = make_task()
    with torch.no_grad():
        task.classifier.weight.zero_()
        task.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    batch = make_batch()
    assert task(batch, {})[1] == {}
    found = task(batch, {"measure": 1.0})[1]["batch_top1"]
    assert found == pytest.approx(100 * (batch.labels == 1).float().mean())


def test_the_new_classifier_is_uniform():
    loss, _ = make_task()(make_batch(), {})
    assert loss.item() == pytest.approx(math.log(3), abs=1e-3)


# --- mixing, from the images themselves: image i is constant with value i


def constant_images(count=6):
    return torch.arange(count, dtype=torch.float)[:, None, None, None].expand(-1, 3, 16, 12).clone()


@pytest.mark.parametrize("seed", range(4))
def test_mixup_targets_have_the_shares_of_the_pixels(seed):
    torch.manual_seed(seed)
    mixed, target = Mixing(6, mixup=0.8, cutmix=0, share=1)(constant_images(), torch.arange(6))
    kept = mixed[3, 0, 0, 0].item() - 2  # 3 * kept + 2 * (1 - kept) = 2 + kept
    assert 0 <= kept <= 1
    for i in range(6):
        other = (i - 1) % 6
        assert torch.allclose(mixed[i], torch.tensor(kept * i + (1 - kept) * other), atol=1e-5)
        expected = torch.zeros(6)
        expected[i] += kept
        expected[other] += 1 - kept
        torch.testing.assert_close(target[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix_targets_have_the_shares_of_the_pixels(seed):
    torch.manual_seed(seed)
    mixed, target = Mixing(6, mixup=0, cutmix=1.0, share=1)(constant_images(), torch.arange(6))
    for i in range(6):
        other = (i - 1) % 6
        assert set(mixed[i].unique().tolist()) <= {float(i), float(other)}
        expected = torch.zeros(6)
        expected[i] = (mixed[i] == i).float().mean()
        expected[other] = (mixed[i] == other).float().mean()
        torch.testing.assert_close(target[i], expected, atol=1e-5, rtol=0)


def test_both_kinds_come_up_and_a_share_stays_unmixed():
    """Over 200 batches: about half mixed, in two kinds at even odds."""
    mixing = Mixing(6, mixup=0.8, cutmix=1.0, share=0.5)
    counts = {"none": 0, "mixup": 0, "cutmix": 0}
    torch.manual_seed(0)
    for _ in range(200):
        images = constant_images()
        mixed, target = mixing(images, torch.arange(6))
        if torch.equal(mixed, images):
            counts["none"] += 1
        else:
            whole = set(mixed.unique().tolist()) <= set(map(float, range(6)))
            counts["cutmix" if whole else "mixup"] += 1
        torch.testing.assert_close(target.sum(1), torch.ones(6))
    assert counts["none"] == pytest.approx(100, abs=30)
    assert counts["mixup"] == pytest.approx(50, abs=25)
    assert counts["cutmix"] == pytest.approx(50, abs=25)


def test_mixing_off_gives_plain_labels_and_draws_nothing():
    state = torch.get_rng_state()
    images, target = Mixing(4, mixup=0, cutmix=0, share=1)(constant_images(4), torch.arange(4))
    assert torch.equal(images, constant_images(4))
    assert torch.equal(target, torch.eye(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mixed_run_depends_on_the_seed_of_the_loop_alone():
    def run(seed, noise):
        task = make_task(mixing=Mixing(3, mixup=0.8, cutmix=1.0, share=1), label_smoothing=0.1)
        torch.manual_seed(noise)
        return train(task, [make_batch(seed=s) for s in range(3)], seed=seed).state_dict()

    first, again, other = run(0, 1), run(0, 2), run(1, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_the_loss_of_a_mixed_smoothed_target_by_hand():
    """target = 0.9 * shares + 0.1 / 3, cross-entropy in numpy."""

    class Fixed(torch.nn.Module):
        shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.3, 0.7]])

        def forward(self, images, labels):
            return images, self.shares

    task = make_task(label_smoothing=0.1, mixing=Fixed())
    torch.nn.init.normal_(task.classifier.weight)
    batch = make_batch(2)
    loss, _ = task(batch, {})
    with torch.no_grad():
        logits = task.classifier(task.backbone(task.backbone.preprocess(batch.images)))
    logits = logits.double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = 0.9 * Fixed.shares.numpy() + 0.1 / 3
    assert loss.item() == pytest.approx(-(target * log_p).sum(1).mean(), rel=1e-5)


# --- labels stay with their images


def test_labels_follow_the_shown_images_through_chunks():
    """A replacement for a broken image brings its own label: indices say what is shown."""
    crops = torch.arange(4, dtype=torch.uint8)[None, :, None, None, None].expand(1, 4, 3, 2, 2)
    crop_batch = CropBatch(Crops(crops, torch.zeros(0, 4, 3, 2, 2)), torch.tensor([7, 2, 2, 9]))
    labels = torch.arange(10) * 10
    batch = LabelledImages.of(crop_batch, labels)
    assert batch.labels.tolist() == [70, 20, 20, 90]
    first, second = batch.to(torch.device("cpu")).chunk(2)
    assert (first.images[:, 0, 0, 0].tolist(), first.labels.tolist()) == ([0, 1], [70, 20])
    assert (second.images[:, 0, 0, 0].tolist(), second.labels.tolist()) == ([2, 3], [20, 90])
    with pytest.raises(ValueError, match=r"4 images cannot be split into 3"):
        batch.chunk(3)


# --- places


def test_places_equal_a_stable_sort_with_ties():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (200, 7)).astype(np.float32)  # many ties
    labels = rng.integers(0, 7, 200)
    expected = [
        np.argsort(-row, kind="stable").tolist().index(label)
        for row, label in zip(logits, labels, strict=True)
    ]
    found = class_places(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.tolist() == expected
