"""Sharded training on two gloo processes against DDP on two and against one process."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

from dino_kd.data.multicrop import Crops
from dino_kd.distributed import local_part, process_group, rank, world_size
from dino_kd.engine import sharding
from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import ConfigError
from dino_kd.models import compiled_blocks
from dino_kd.models.backbone import create_backbone
from dino_kd.models.compiled_blocks import compile_blocks
from dino_kd.models.head import DINOHead
from dino_kd.tasks.dino import DinoTask
from tests.two_ranks import cpus_can_shard, on_two_ranks

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
BATCH = 8
# What differs from the default run: its length, the loop, the network, a step with a NaN loss.
SCENARIOS = {
    "plain": {"steps": 20},
    "accumulate": {"accumulate": 2},
    "clipped": {"clip_grad": 0.05, "bad_step": 5},
    "sgd": {"optimizer": "sgd", "steps": 5},
    # sgd: Adam would blow up the rounding of biases whose gradient a batch norm makes zero
    "batch_norm": {"batch_norm": True, "unit_prototypes": False, "optimizer": "sgd", "steps": 5},
    "recompute": {"recompute": True, "steps": 5},
    "bf16": {"precision": "bf16", "steps": 4},
    "compiled": {"compiles": True, "steps": 5},
}


class Rows:
    """A log that keeps the numbers."""

    def __init__(self):
        self.rows = []

    def numbers(self, step, values):
        self.rows.append(values)

    def warn(self, text):
        raise AssertionError(text)

    def progress(self, *_):
        pass


def make_task(recompute=False, compiles=False, **head):
    torch.manual_seed(0)
    args = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=args)
    if recompute:  # blocks run once more within the backward pass
        backbone.net.set_grad_checkpointing(True)
    return DinoTask(
        backbone,
        DINOHead(24, 32, hidden_dim=16, bottleneck_dim=8, num_layers=2, **head),
    )


def share_out(task, compiles=False):
    student, teacher = task.student, task.teacher
    sharding.shard([student.backbone, student.head, teacher.backbone, teacher.head], CPU)
    if compiles:
        assert [compile_blocks(n.backbone.net) for n in (student, teacher)] == [2, 2]
    return task.to(CPU)


def programs_without_a_compiler():
    """What torch.compile traces, run as it is; returns the count of programs."""
    counter = CompileCounterWithBackend("eager")
    program = torch.compile(compiled_blocks._block, dynamic=False, backend=counter)
    compiled_blocks._program = lambda: program
    return counter


def my_crops(step):
    """This process's share of the crops of one step."""
    generator = torch.Generator().manual_seed(step)

    def images(n, side):
        shape = (n, BATCH, 3, side, side)
        whole = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return whole.chunk(world_size(), 1)[rank()]

    return Crops(images(2, 16), images(2, 8))


def train(
    task, *, start=0, steps=8, optimizer="adamw", restore=None, bad_step=None, accumulate=1,
    clip_grad=0.5, precision="fp32",
):  # fmt: skip
    """Losses and norms of every step, the task, and its optimiser."""
    groups = parameter_groups(task.student, task.student.head.prototype_parameters())
    optim = make_optimizer(optimizer, groups)
    if restore is not None:
        task.load_state_dict(sharding.slices_like(restore["task"], task))
        optim.load_state_dict(sharding.optimizer_slices(restore["optimizer"], optim))
    bad = float("nan") if rank() == world_size() - 1 else 0.04  # one process fails, all skip
    log = Rows()
    fit(
        task,
        (my_crops(step) for step in range(start, steps)),
        optim,
        {
            "lr": lambda s: 1e-3 if optimizer == "adamw" else 0.1,
            "weight_decay": lambda s: 0.1,
            "momentum": lambda s: 0.9,
            "teacher_temp": lambda s: bad if s == bad_step else 0.04,
            "freeze_last_layer": lambda s: float(s < 3),
        },
        FitOptions(
            steps, BATCH, CPU, accumulate=accumulate, clip_grad=clip_grad, log_every=1,
            precision=precision,
        ),
        progress=Progress(step=start),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=log,
        save=lambda progress: None,
        stop=StopFlag(),
    )  # fmt: skip
    return log.rows, task, optim


def outcome(task, rows, optim):
    """What is compared: numbers of every step, and whole weights."""
    state = sharding.gather({"task": task.state_dict(), "optimizer": optim.state_dict()})
    return {"loss": [r["loss"] for r in rows], "norm": [r["grad_norm"] for r in rows],
            "skipped": [r["skipped_steps"] for r in rows], **state}  # fmt: skip


def network_options(scenario):
    names = ("batch_norm", "unit_prototypes", "recompute", "compiles")
    return {k: v for k, v in scenario.items() if k in names}, {
        k: v for k, v in scenario.items() if k not in names
    }


def on_each_rank(folder, rank):
    with process_group("cpu"):
        if not cpus_can_shard():
            return
        found = {}
        programs = programs_without_a_compiler()
        for name, scenario in SCENARIOS.items():
            head, options = network_options(scenario)
            shares = functools.partial(share_out, compiles=scenario.get("compiles", False))
            for mode, place in (("ddp", lambda task: task), ("sharded", shares)):
                task = place(make_task(**head))
                rows, task, optim = train(task, **options)
                found[name, mode] = outcome(task, rows, optim)
        first, task, optim = train(share_out(make_task()), steps=10)
        saved = [None, outcome(task, first, optim)] if rank else [outcome(task, first, optim), None]
        torch.distributed.broadcast_object_list(saved, src=0)
        rows, again, optim = train(share_out(make_task()), start=10, steps=20, restore=saved[0])
        found["resumed"] = outcome(again, first + rows, optim)
        found["programs"] = programs.frame_count
        found["short"] = rows_of_the_last_block()
        found["local"] = local_sizes(*train(share_out(make_task()), steps=4)[1:])
        copies = whole_copies()
        if rank == 0:
            found["whole"] = copies
        torch.save(found, folder / f"{rank}.pt")


def rows_of_the_last_block():
    """Tokens that its MLP is given: in training, and in a forward pass somebody listens to."""
    task = share_out(make_task())
    block = task.student.backbone.net.blocks[-1]
    rows = []
    inner = block.mlp.fc1.forward
    block.mlp.fc1.forward = lambda x: (rows.append(x.shape[1]), inner(x))[1]
    train(task, steps=1)
    heard = []
    hook = block.register_forward_hook(lambda module, inputs, output: heard.append(output.shape[1]))
    task.student.backbone(torch.rand(1, 3, 16, 16))
    hook.remove()
    return {"trained": rows[:-1], "listened": rows[-1:] + heard}


def local_sizes(task, optim):
    """Elements here and over all: of student and teacher, and of the optimiser's moments."""
    moments = [t for s in optim.state.values() for k, t in s.items() if k != "step"]
    return {
        kind: (sum(local_part(t).numel() for t in tensors), sum(t.numel() for t in tensors))
        for kind, tensors in (
            ("student", list(task.student.parameters())),
            ("teacher", list(task.teacher.parameters())),
            ("moments", moments),
        )
    }


def whole_copies():
    """A trained teacher's features from a whole copy, computed by the main process alone."""
    task = make_task()
    copy = sharding.WholeCopy(task.teacher.backbone)
    train(share_out(task), steps=3)
    made = copy().eval()
    weights = sharding.gather(task.teacher.backbone.state_dict())
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if rank():
        return None
    with torch.no_grad():
        return {"features": made(images), "weights": weights}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(functools.partial(on_each_rank, folder))
    if not list(folder.iterdir()):
        pytest.skip("this version of PyTorch cannot shard on CPUs")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def alone(name):
    head, options = network_options(SCENARIOS[name])
    rows, task, optim = train(make_task(**head), **options)
    return outcome(task, rows, optim)


def assert_same(found, expected, rtol=1e-3, atol=1e-4):
    """Weights to a tenth of one step of Adam, which turns rounding into steps of its own."""
    for kind in ("loss", "norm", "skipped"):
        assert found[kind] == pytest.approx(expected[kind], rel=rtol, nan_ok=True), kind
    assert found["task"].keys() == expected["task"].keys()
    for name, value in expected["task"].items():
        torch.testing.assert_close(
            found["task"][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in ("batch_norm", "bf16")])
def test_sharded_steps_equal_ddp_and_one_process(found, name):
    """Losses, gradient norms, student, teacher and centre, up to the order of additions."""
    assert_same(found[0][name, "sharded"], found[0][name, "ddp"])
    assert_same(found[0][name, "sharded"], alone(name))


def test_blocks_of_sharded_networks_share_their_programs(found):
    """One for each: teacher, and student on crops of two sizes."""
    assert found[0]["programs"] == 3


def test_the_last_block_of_a_sharded_network_computes_one_token(found):
    """All of them where a hook waits for its output."""
    assert found[0]["short"]["trained"] == [1, 1]
    assert found[0]["short"]["listened"] == [17, 17]


def test_batch_norm_statistics_equal_those_of_ddp(found):
    """Not those of one process, which normalises by larger batches."""
    sharded = found[0]["batch_norm", "sharded"]
    assert "student.head.mlp.1.running_var" in sharded["task"]
    assert_same(sharded, found[0]["batch_norm", "ddp"])


def test_autocast_reaches_sharded_networks(found):
    """bf16 is coarse: losses as near to DDP's as DDP's are to those of one process, not nearer."""
    sharded, ddp = found[0]["bf16", "sharded"], found[0]["bf16", "ddp"]
    assert sharded["loss"] == pytest.approx(ddp["loss"], rel=0.02)
    assert sharded["norm"] == pytest.approx(ddp["norm"], rel=0.05)
    assert sharded["norm"][0] != pytest.approx(found[0]["plain", "sharded"]["norm"][0], rel=1e-4)


def test_clipping_and_the_skipped_step_took_place(found):
    clipped = found[0]["clipped", "sharded"]
    assert min(norm for norm in clipped["norm"] if norm == norm) > 0.05
    assert clipped["skipped"] == [0.0] * 5 + [1.0] * 3
    assert found[0]["sgd", "sharded"]["norm"][0] > 0.5  # whose weights follow the clipped length


def test_a_resumed_sharded_run_is_bit_equal(found):
    resumed, whole = found[0]["resumed"], found[0]["plain", "sharded"]
    assert resumed["loss"] == whole["loss"]
    assert resumed["norm"] == whole["norm"]
    for name, value in whole["task"].items():
        assert torch.equal(resumed["task"][name], value), name
    assert resumed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for number, moments in whole["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(resumed["optimizer"]["state"][number][key], value), (number, key)


def test_each_process_holds_about_half(found):
    """Positions and class token have a first dimension of 1 and lie on the first process whole."""
    for kind in ("student", "teacher", "moments"):
        here = [outcome["local"][kind][0] for outcome in found]
        whole = found[0]["local"][kind][1]
        assert sum(here) == whole
        assert max(here) < 0.53 * whole, kind
    parameters = sum(p.numel() for p in make_task().student.parameters())
    assert found[0]["local"]["student"][1] == parameters
    assert found[0]["local"]["moments"][1] == 2 * parameters


def test_what_is_saved_has_the_layout_of_an_unsharded_run(found):
    sharded, plain = found[0]["plain", "sharded"], alone("plain")
    for kind in ("task", "optimizer"):
        assert layout(sharded[kind]) == layout(plain[kind])
    assert found[1]["plain", "sharded"]["task"]["student.head.last_layer"] is None


def layout(state):
    """Keys, shapes, types and devices; values only where they are no tensors."""
    if isinstance(state, dict):
        return {key: layout(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor):
        return (type(state), state.shape, state.dtype, state.device)
    return state


def test_a_whole_copy_computes_what_the_teacher_does_without_the_others(found):
    """Only the main process passes images through it; the teacher would wait for the other."""
    whole = found[0]["whole"]
    backbone = make_task().teacher.backbone.eval()
    backbone.load_state_dict(whole["weights"])
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(whole["features"], backbone(images), rtol=0, atol=0)


def test_a_single_process_cannot_share():
    with pytest.raises(ConfigError, match=r"optim.shard: .* single one; start it with torchrun"):
        sharding.check_sharding("fp32", "adamw", CPU)


def test_what_cannot_be_sharded_is_said(monkeypatch):
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding, "_averages", lambda device: True)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.0"))
    sharding.check_sharding("bf16", "adamw", CPU)
    with pytest.raises(ConfigError, match=r"optim.shard: with optim.precision=fp16 .* use bf16"):
        sharding.check_sharding("fp16", "adamw", torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=r"optim.shard: lars takes .* use optim.name=adamw or sgd"
    ):
        sharding.check_sharding("fp32", "lars", CPU)
    monkeypatch.setattr(sharding, "_averages", lambda device: False)
    with pytest.raises(ConfigError, match=r"optim.shard: PyTorch .* cannot average .* on cpu"):
        sharding.check_sharding("fp32", "adamw", CPU)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    with pytest.raises(ConfigError, match=r"needs PyTorch 2\.7 or newer, this is 2\.6\.0"):
        sharding.check_sharding("fp32", "adamw", torch.device("cuda"))


def test_a_network_without_blocks_is_refused():
    sharding.check_blocks(make_task().student.backbone)
    with pytest.raises(ConfigError, match="resnet18_cifar has no transformer blocks"):
        sharding.check_blocks(create_backbone("resnet18_cifar", img_size=32))
