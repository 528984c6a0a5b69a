"""What one optimiser step of a ViT-depth network asks of the device: operations and waits."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.tasks.dino import DinoTask
from tests.tasks.test_dino import make_crops

SCHEDULES = {
    "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9, "teacher_temp": 0.04,
    "freeze_last_layer": 0.0,
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts operations by name, less the views: what would be launches on a GPU."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def test_a_step_of_twelve_blocks_waits_once_and_launches_few(monkeypatch):
    """One number is read back from the device; the parts of benchmarks/step.py say of how many."""
    torch.manual_seed(0)
    backbone = create_backbone(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, drop_path=0.1,
        args={"depth": 12, "embed_dim": 24, "num_heads": 2},
    )  # fmt: skip
    task = DinoTask(backbone, DINOHead(24, 32, hidden_dim=16, bottleneck_dim=8))
    groups = parameter_groups(task.student, task.student.head.prototype_parameters())
    optimizer, progress = make_optimizer("adamw", groups), Progress()
    reads = Counter()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def read(tensor, name=name, original=original):
            reads[name] += 1
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)

    one_step = StopFlag()
    one_step.request("one step")

    def step():
        fit(
            task, iter([make_crops(4)]), optimizer,
            {name: lambda step, value=value: value for name, value in SCHEDULES.items()},
            FitOptions(1000, 4, torch.device("cpu"), clip_grad=3.0, log_every=1000),
            progress=progress, scaler=torch.amp.GradScaler("cpu", enabled=False), log=Quiet(),
            save=lambda p: None, stop=one_step,
        )  # fmt: skip

    step()  # makes the optimiser's state, and a row of metrics
    progress.stopped = ""
    reads.clear()
    with Counting() as counting:
        step()
    assert progress.step == 2
    waits = reads + Counter({"aten": counting.calls["_local_scalar_dense"]})
    assert waits == Counter({"tolist": 1})
    assert 0 < sum(counting.calls.values()) <= 1700, counting.calls


class Quiet:
    """A log that keeps nothing."""

    numbers = warn = progress = staticmethod(lambda *found: None)
