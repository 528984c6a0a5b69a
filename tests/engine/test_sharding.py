"""Sharded training on two gloo processes against DDP on two and against one process."""

from __future__ import annotations

import functools

import pytest
import torch

from dino_kd.data.multicrop import Crops
from dino_kd.distributed import local_part, process_group, rank, world_size
from dino_kd.engine import sharding
from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import ConfigError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.tasks.dino import DinoTask
from tests.two_ranks import on_two_ranks

CPU = torch.device("cpu")
BATCH, STEPS = 8, 20
# What differs from the plain run: options of the loop, of the network, a step with a NaN loss.
SCENARIOS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "clipped": {"clip_grad": 0.05},
    "unclipped": {"clip_grad": 0.0},
    "skipped": {"bad_step": 5},
    "batch_norm": {"batch_norm": True},
    "lengths": {"unit_prototypes": False},
    "sgd": {"optimizer": "sgd"},
    "lars": {"optimizer": "lars"},
    "bf16": {"precision": "bf16"},
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


def make_task(**head):
    torch.manual_seed(0)
    args = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=args)
    return DinoTask(
        backbone,
        DINOHead(24, 32, hidden_dim=16, bottleneck_dim=8, num_layers=2, **head),
    )


def share_out(task):
    for network in (task.student, task.teacher):
        sharding.shard(network.backbone, CPU)
        sharding.shard(network.head, CPU)
    return task.to(CPU)


def my_crops(step):
    """This process's share of the crops of one step."""
    generator = torch.Generator().manual_seed(step)

    def images(n, side):
        shape = (n, BATCH, 3, side, side)
        whole = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return whole.chunk(world_size(), 1)[rank()]

    return Crops(images(2, 16), images(2, 8))


def train(
    task, *, start=0, steps=STEPS, optimizer="adamw", restore=None, bad_step=None, accumulate=1,
    clip_grad=0.5, precision="fp32",
):  # fmt: skip
    """Losses and norms of every step, the task, and its optimiser."""
    groups = parameter_groups(task.student, task.student.head.prototype_parameters())
    optim = make_optimizer(optimizer, groups)
    if restore is not None:
        task.load_state_dict(sharding.slices_like(restore["task"], task))
        optim.load_state_dict(sharding.optimizer_slices(restore["optimizer"], optim))
    log = Rows()
    fit(
        task,
        (my_crops(step) for step in range(start, steps)),
        optim,
        {
            "lr": lambda s: 1e-3 if optimizer == "adamw" else 0.1,
            "weight_decay": lambda s: 0.1,
            "momentum": lambda s: 0.9,
            "teacher_temp": lambda s: float("nan") if s == bad_step else 0.04,
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


def head_options(scenario):
    names = ("batch_norm", "unit_prototypes")
    return {k: v for k, v in scenario.items() if k in names}, {
        k: v for k, v in scenario.items() if k not in names
    }


def on_each_rank(folder, rank):
    with process_group("cpu"):
        found = {}
        for name, scenario in SCENARIOS.items():
            head, options = head_options(scenario)
            for mode, place in (("ddp", lambda task: task), ("sharded", share_out)):
                task = place(make_task(**head))
                rows, task, optim = train(task, **options)
                found[name, mode] = outcome(task, rows, optim)
        first, task, optim = train(share_out(make_task()), steps=10)
        saved = [None, outcome(task, first, optim)] if rank else [outcome(task, first, optim), None]
        torch.distributed.broadcast_object_list(saved, src=0)
        rows, again, optim = train(share_out(make_task()), start=10, restore=saved[0])
        found["resumed"] = outcome(again, first + rows, optim)
        found["local"] = local_sizes(*train(share_out(make_task()), steps=4)[1:])
        copies = whole_copies()
        if rank == 0:
            found["whole"] = copies
        torch.save(found, folder / f"{rank}.pt")


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
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def alone(name):
    head, options = head_options(SCENARIOS[name])
    rows, task, optim = train(make_task(**head), **options)
    return outcome(task, rows, optim)


def assert_same(found, expected, rtol=1e-4, atol=1e-5):
    for kind in ("loss", "norm", "skipped"):
        assert found[kind] == pytest.approx(expected[kind], rel=rtol, nan_ok=True), kind
    assert found["task"].keys() == expected["task"].keys()
    for name, value in expected["task"].items():
        torch.testing.assert_close(
            found["task"][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


if __name__ == "__main__":
    import sys, tempfile, pathlib, time
    t=time.time()
    folder = pathlib.Path(tempfile.mkdtemp())
    on_two_ranks(functools.partial(on_each_rank, folder))
    print("spawn", time.time()-t)
    r = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    print(r[0]["local"], r[1]["local"])
    for name in SCENARIOS:
        a = alone(name)
        for x, y, lab in ((r[0][name,"sharded"], r[0][name,"ddp"], "sharded-ddp"), (r[0][name,"ddp"], a, "ddp-alone")):
            dl = max(abs(p-q) for p,q in zip(x["loss"],y["loss"]) if p==p)
            dn = max(abs(p-q)/abs(q) for p,q in zip(x["norm"],y["norm"]) if p==p)
            dw = {k.split(".")[0]: 0. for k in x["task"]}
            for k,v in y["task"].items():
                dw[k.split(".")[0]] = max(dw[k.split(".")[0]], (x["task"][k].double()-v.double()).abs().max().item())
            print(f"{name:11s} {lab:12s} loss {dl:.1e} norm {dn:.1e}", {k: f"{v:.1e}" for k,v in dw.items()}, x["skipped"][-1], [round(v,3) for v in x["norm"][:3]])
    print(time.time()-t)
