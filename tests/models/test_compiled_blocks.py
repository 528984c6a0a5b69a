"""Compiled blocks against the blocks they were."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dino_kd.data.held import HeldImages
from dino_kd.engine.compilation import compiler_works
from dino_kd.engine.hooks import KnnMonitor
from dino_kd.features import FeatureBank
from dino_kd.models import compiled_blocks
from dino_kd.models.attention import attention_maps
from dino_kd.models.backbone import create_backbone
from dino_kd.models.compiled_blocks import compile_blocks

SMALL = {"depth": 4, "embed_dim": 24, "num_heads": 2, "init_values": 0.5}


def build(drop_path=0.5):
    torch.manual_seed(0)
    return create_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, drop_path=drop_path, args=SMALL
    ).train()


def step(backbone, x):
    torch.manual_seed(1)
    backbone.zero_grad(set_to_none=True)
    features = backbone(x)
    (features * torch.arange(24.0)).sum().backward()
    return [features.detach(), *(p.grad for p in backbone.parameters())]


@pytest.fixture
def eager(compiled_eagerly):
    """The program without a compiler: what is done around it is the same."""
    return compiled_eagerly(compiled_blocks)


def test_features_and_gradients_stay_and_blocks_share_one_program(eager):
    """With stochastic depth: the same numbers, and no program for each of its rates."""
    plain, compiled = build(), build()
    assert compile_blocks(compiled.net) == 4
    x = torch.randn(6, 3, 32, 32)
    torch.testing.assert_close(step(compiled, x), step(plain, x), rtol=1e-5, atol=1e-5)
    assert eager.frame_count <= 2  # the first block's rate is 0: no factors


def test_names_of_weights_stay_and_a_copy_computes_with_its_own(eager):
    backbone = build(drop_path=0.0)
    names = list(backbone.state_dict())
    compile_blocks(backbone.net)
    assert list(backbone.state_dict()) == names
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in twin.net.blocks.parameters():
            parameter.zero_()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(twin(x), backbone(x))
    backbone.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(x), backbone(x))


def test_hooks_inside_a_block_are_still_called(eager):
    backbone = build(drop_path=0.0).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = attention_maps(backbone, x, block=1)
    compile_blocks(backbone.net)
    backbone(x)
    torch.testing.assert_close(attention_maps(backbone, x, block=1), expected)


def test_scores_within_a_run_compile_nothing(eager):
    """Their batches have sizes of their own, and each would be a program."""
    backbone = build(drop_path=0.0)
    compile_blocks(backbone.net)
    backbone(torch.randn(6, 3, 32, 32))
    before = eager.frame_count
    images = HeldImages(list(np.zeros((5, 32, 32, 3), np.uint8)), list("abcde"), "held")
    images.labels, images.class_names = np.array([0, 1, 0, 1, 0]), ["x", "y"]

    def extract(network, data, indices):
        with torch.no_grad():
            features = network(torch.randn(len(indices), 3, 32, 32))
        return FeatureBank(features, None, torch.tensor(indices))

    monitor = KnnMonitor(
        backbone, images, images, extract=extract, every=1, total_steps=1, k=1, max_images=5,
        say=print,
    )  # fmt: skip
    assert 0 <= monitor(1, backbone, {})["knn_top1"] <= 100
    assert eager.frame_count == before


def test_further_sizes_are_compiled_too(eager):
    """PyTorch's own limit is eight programs, behind which it goes on uncompiled."""
    backbone = build(drop_path=0.0)
    compile_blocks(backbone.net)
    for count in range(1, 13):
        backbone(torch.randn(count, 3, 32, 32))
    assert eager.frame_count == 12


@pytest.mark.slow
def test_really_compiled_blocks_give_the_same():
    if not compiler_works("cpu"):
        pytest.skip("no compiler here")
    plain, compiled = build(), build()
    compile_blocks(compiled.net)
    x = torch.randn(6, 3, 32, 32)
    torch.testing.assert_close(step(compiled, x), step(plain, x), rtol=1e-4, atol=1e-5)
