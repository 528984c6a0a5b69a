"""Crops of two sizes in one row of tokens against the network on one size after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import DropPath, GluMlp, SwiGLU
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dino_kd.distributed import process_group
from dino_kd.engine.compilation import compiler_works
from dino_kd.errors import ConfigError
from dino_kd.models import packed_crops
from dino_kd.models.attention import kept_input
from dino_kd.models.checkpointing import checkpoint_activations
from dino_kd.models.compiled_blocks import compile_blocks
from dino_kd.models.kernels import choose_kernels
from dino_kd.models.low_weights import with_low_weights
from dino_kd.models.packed_crops import check_packing
from dino_kd.tasks.dino import DinoTask
from tests.models import test_cls_only as cls_only
from tests.models.test_cls_only import OTHERS, SMALL
from tests.models.test_low_weights import distance
from tests.tasks.test_dino import VALUES, make_crops, make_task, share, train
from tests.tasks.test_step_cost import Counting
from tests.tiny import draw
from tests.two_ranks import on_two_ranks

VARIANTS = {
    **cls_only.VARIANTS,
    "two registers, late positions": (
        "vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "pre_norm": True},
    ),
    "SwiGLU": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLU, "scale_mlp_norm": True}),
    "GLU": ("vit_tiny_patch16_224", {"mlp_layer": GluMlp, "proj_bias": False}),
    "left-out patches": ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}),
    "one block": ("vit_tiny_patch16_224", {"depth": 1}),
    "deep": ("vit_tiny_patch16_224", {"depth": 12}),
}  # fmt: skip
GROUPS = [draw(6, 3, 32, 32, seed=1), draw(9, 3, 16, 16, seed=2), draw(3, 3, 24, 16, seed=3)]


def small(variant="plain", **more):
    name, args = VARIANTS[variant]
    return cls_only.build(name, {**SMALL, **args}, **more)


def apart(backbone):
    """The features of all groups, one pass each."""
    return lambda groups: torch.cat([backbone(x) for x in groups])


def gradients(backbone, forward, groups=GROUPS):
    return cls_only.gradients(backbone, forward, groups)


def assert_equal(found, expected, rtol=1e-5):
    """Features, and the gradient of every parameter, relative to its length."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_gradients_are_those_of_one_size_after_the_other(variant, fused):
    """With stochastic depth, whose numbers are the same, for both kinds of attention."""
    backbone = small(variant, drop_path=0.5)
    choose_kernels(backbone, "cpu", torch.float32 if fused else torch.bfloat16)
    assert packed_crops.fits(backbone.net)
    assert_equal(gradients(backbone, backbone), gradients(backbone, apart(backbone)))


def test_gated_attention_is_gated():
    backbone = small(drop_path=0.5)
    if not hasattr(backbone.net.blocks[0].attn, "gate"):
        pytest.skip("this timm has no gates")
    for block in backbone.net.blocks:
        block.attn.gate = nn.Linear(24, 24)
    assert_equal(gradients(backbone, backbone), gradients(backbone, apart(backbone)))


def test_unscaled_stochastic_depth_and_a_block_that_is_always_left_out():
    backbone = small("layer scale", drop_path=0.5)
    backbone.net.blocks[1].drop_path1.scale_by_keep = False
    backbone.net.blocks[1].drop_path2.drop_prob = 1.0
    assert_equal(gradients(backbone, backbone), gradients(backbone, apart(backbone)))


def test_the_random_numbers_that_follow_are_the_same():
    backbone = small(drop_path=0.5)
    following = []
    for forward in (backbone, apart(backbone)):
        torch.manual_seed(1)
        forward(GROUPS)
        following.append(torch.rand(4))
    assert torch.equal(*following)


def test_in_eval_mode_and_in_float64_the_two_agree_to_the_last_digits():
    backbone = small(drop_path=0.5).double().eval()
    groups = [x.double() for x in GROUPS]
    torch.testing.assert_close(backbone(groups), apart(backbone)(groups), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_in_bf16_the_error_is_no_larger(fused):
    """By autocast and by cast weights, against float32, with the same images dropped."""
    backbone = small("layer scale", drop_path=0.5)
    choose_kernels(backbone, "cpu", torch.float32 if fused else torch.bfloat16)

    def autocast(forward):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(GROUPS)

    def low(passes):
        return torch.cat(with_low_weights(backbone, passes, torch.bfloat16))

    exact = listed(gradients(backbone, apart(backbone)))
    for together, one_by_one in (
        (lambda groups: autocast(backbone), lambda groups: autocast(apart(backbone))),
        (lambda groups: low([groups]), low),
    ):
        packed, usual = (
            [distance(*pair) for pair in zip(listed(gradients(backbone, f)), exact, strict=True)]
            for f in (together, one_by_one)
        )
        for error, usual_error in zip(packed, usual, strict=True):
            assert 0 < error <= 1.25 * usual_error < 0.1


def listed(made):
    """Features, and gradients."""
    return [made[0].float()], list(made[1].values())


# --- what it saves


def test_fewer_operations_in_both_directions():
    """Of a network of twelve blocks, forward and backward, views not counted."""
    backbone = small("deep", drop_path=0.1)
    counts = []
    for forward in (backbone, apart(backbone)):
        with Counting() as counting:
            features = forward(GROUPS[:2])
        with Counting() as backward:
            features.sum().backward()
        counts.append([sum(c.calls.values()) for c in (counting, backward)])
    packed, one_by_one = counts
    assert packed[0] < 0.75 * one_by_one[0]
    assert packed[1] < 0.65 * one_by_one[1]


def test_the_blocks_see_one_row_of_tokens_and_the_last_one_a_token_an_image():
    backbone = small()
    seen = []
    for block in backbone.net.blocks:
        inner = block.mlp.fc1.forward
        block.mlp.fc1.forward = lambda x, inner=inner: (seen.append(x.shape[:-1]), inner(x))[1]
    backbone(GROUPS)
    assert seen == [(6 * 17 + 9 * 5 + 3 * 7,)] * 2 + [(18, 1)]


# --- compiled


@pytest.fixture
def eager(compiled_eagerly):
    """The program without a compiler: what is done around it is the same."""
    return compiled_eagerly(packed_crops)


def test_compiled_blocks_share_one_program_and_give_the_same(eager):
    """With stochastic depth, cast weights that are new at every step, and for a copy."""
    backbone = small("deep", drop_path=0.5)
    expected = gradients(backbone, apart(backbone))
    compile_blocks(backbone.net)
    assert_equal(gradients(backbone, backbone), expected)
    assert eager.frame_count == 2  # the first block's rate is 0: no factors
    twin = copy.deepcopy(backbone)
    assert_equal(gradients(twin, twin), expected)
    for _ in range(2):
        with_low_weights(backbone, [GROUPS], torch.bfloat16)[0].sum().backward()
    assert eager.frame_count == 4  # another two for bf16


@pytest.mark.slow
def test_really_compiled_blocks_give_the_same():
    if not compiler_works("cpu"):
        pytest.skip("no compiler here")
    backbone = small("layer scale", drop_path=0.5)
    expected = gradients(backbone, apart(backbone))
    compile_blocks(backbone.net)
    assert_equal(gradients(backbone, backbone), expected, rtol=1e-4)


# --- in training


def packing(task):
    task.student.packs_crops = True
    return task


def test_a_training_is_the_same_in_whole_batches_and_in_micro_batches():
    """Three steps of `fit`: losses, student, teacher and centre."""
    batches = [make_crops(16, seed=s) for s in range(3)]
    for accumulate in (1, 4):
        plain, packed = with_drop_path(make_task()), packing(with_drop_path(make_task()))
        torch.manual_seed(0)
        expected = train(plain, batches, accumulate)
        torch.manual_seed(0)
        assert train(packed, batches, accumulate) == pytest.approx(expected, rel=1e-5)
        for name, value in plain.state_dict().items():
            found = packed.state_dict()[name]
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5, msg=name)


def with_drop_path(task: DinoTask) -> DinoTask:
    for block in task.student.backbone.net.blocks:
        block.drop_path1 = block.drop_path2 = DropPath(0.3)
    return task


def test_a_single_group_goes_the_usual_way(monkeypatch):
    monkeypatch.setattr(packed_crops, "class_features", None)
    task = packing(make_task())
    assert task(make_crops(4, num_local=0), VALUES)[0].isfinite()


def check_two_ranks(rank):
    """The mean gradient of two halves against that of one unpacked process."""
    crops = make_crops(8)
    alone = make_task()
    alone(crops, VALUES)[0].backward()
    with process_group("cpu"):
        task = packing(make_task())
        shared = DistributedDataParallel(task)
        shared(share(crops, rank), VALUES)[0].backward()
    for name, parameter in alone.student.named_parameters():
        found = task.student.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.dist
def test_two_processes_equal_one():
    on_two_ranks(check_two_ranks)


# --- what does not fit


@pytest.mark.parametrize("kind", OTHERS)
def test_other_networks_are_refused_and_would_be_left_alone(kind):
    backbone = cls_only.build(*OTHERS[kind]).eval()
    with pytest.raises(ConfigError, match=rf"^model.pack_crops: {backbone.name} is not.*=false$"):
        check_packing(backbone.net, backbone.name, checkpointing=False, sharded=False)
    groups = [draw(2, 3, *backbone.img_size)] * 2
    assert torch.equal(backbone(groups), apart(backbone)(groups))


@pytest.mark.parametrize("argument", ["attn_drop_rate", "pos_drop_rate", "drop_rate"])
def test_dropout_is_refused_and_would_be_drawn_as_ever(argument):
    backbone = cls_only.build("vit_tiny_patch16_224", {**SMALL, argument: 0.1})
    with pytest.raises(ConfigError, match=r"model.pack_crops.*dropout.*model.args"):
        check_packing(backbone.net, backbone.name, checkpointing=False, sharded=False)
    assert_equal(gradients(backbone, backbone), gradients(backbone, apart(backbone)), rtol=0)


def test_hooks_are_refused_and_would_see_every_group():
    backbone = small()
    for module in (backbone.net.blocks[0], backbone.net.blocks[1].attn, backbone.net.norm):
        with kept_input(module) as seen:
            with pytest.raises(ConfigError, match=r"model.pack_crops.*hook on (blocks|norm)"):
                check_packing(backbone.net, backbone.name, checkpointing=False, sharded=False)
            backbone(GROUPS)
        assert [x.shape[:2] for x in seen] == [(6, 17), (9, 5), (3, 7)]
    check_packing(backbone.net, backbone.name, checkpointing=False, sharded=False)


def test_another_kind_of_block_anywhere_is_refused():
    backbone = small()
    backbone.net.blocks[0].adapter = nn.Identity()
    assert not packed_crops.fits(backbone.net)
    backbone = small()
    backbone.net.blocks[1].drop_path2 = nn.Tanh()
    assert not packed_crops.fits(backbone.net)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpointing": True}, "model.checkpoint_activations"),
        ({"sharded": True}, "optim.shard"),
    ],
)
def test_settings_that_do_not_go_together_are_said(options, words):
    backbone = small()
    with pytest.raises(ConfigError, match=f"^model.pack_crops: {words}.*model.pack_crops=false$"):
        check_packing(backbone.net, "ViT", **{"checkpointing": False, "sharded": False, **options})
    checkpoint_activations(backbone)
    assert not packed_crops.fits(backbone.net)
