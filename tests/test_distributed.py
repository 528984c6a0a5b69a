"""Collectives on two real gloo processes, against what numpy says."""

from __future__ import annotations

import datetime
import functools
import time

import pytest
import torch

from dino_kd import distributed
from dino_kd.data.multicrop import Crops
from dino_kd.distributed import all_gather_objects, all_gather_rows, on_main, process_group
from dino_kd.errors import ConfigError, DataError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.tasks.dino import DinoTask
from tests.two_ranks import on_two_ranks


def in_a_group(work, rank):
    with process_group("cpu"):
        work(rank)


def check_gathering(rank):
    """Ragged rows and an empty rank, in rank order; Python lists likewise."""
    rows = torch.arange(3 * rank + 2).reshape(-1, 1) + 100 * rank  # 2 and 5 rows
    expected = torch.tensor([0, 1, 100, 101, 102, 103, 104])[:, None]
    assert torch.equal(all_gather_rows(rows), expected)
    assert torch.equal(all_gather_rows(rows[: 2 * (1 - rank)]), expected[:2])
    assert all_gather_objects([rank] * (rank + 1)) == [0, 1, 1]


def check_errors(rank):
    """What fails on the main process is said by all; nobody waits for ever."""

    def fail():
        raise DataError("no such folder")

    with pytest.raises(DataError, match="no such folder"):
        on_main(fail)
    assert on_main(lambda: 7) == 7


def check_patience(rank):
    """The main process may work alone for longer than a collective waits for it."""
    second = datetime.timedelta(seconds=1)
    torch.distributed.distributed_c10d._set_pg_timeout(second, torch.distributed.group.WORLD)
    assert on_main(lambda: time.sleep(3) or 7) == 7


def check_batch_norm(rank):
    """Running statistics are the mean over ranks after a step, student and teacher."""
    torch.manual_seed(0)
    backbone = create_backbone("resnet10t", img_size=32)
    task = DinoTask(backbone, DINOHead(backbone.embed_dim, 8, hidden_dim=8, bottleneck_dim=4))
    torch.manual_seed(rank)
    crops = Crops(
        torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8),
        torch.zeros(0, 4, 3, 16, 16, dtype=torch.uint8),
    )
    values = {"teacher_temp": 0.04, "momentum": 0.9}
    task(crops, values)
    for branch in (task.student, task.teacher):
        norm = branch.backbone.net.bn1
        both = all_gather_rows(norm.running_mean[None].clone())
        assert not torch.equal(both[0], both[1])
        branch.expected = both.mean(0)
    task.after_step(values, skipped=False)
    for branch in (task.student, task.teacher):
        torch.testing.assert_close(branch.backbone.net.bn1.running_mean, branch.expected)


@pytest.mark.dist
@pytest.mark.parametrize("work", [check_gathering, check_errors, check_patience, check_batch_norm])
def test_two_ranks(work):
    on_two_ranks(functools.partial(in_a_group, work))


def test_a_store_that_is_gone_ends_the_waiting(monkeypatch):
    """It went with a main process that had said its word; the collective tells the rest."""

    class Gone:
        asked = 0

        def check(self, keys):
            self.asked += 1
            if self.asked > 2:
                raise torch.distributed.DistNetworkError("connection reset by peer")
            return False

    store = Gone()
    monkeypatch.setattr(distributed, "_notes", [store])
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    distributed._wait_for_main()
    assert store.asked == 3


def test_a_single_process_needs_no_group():
    rows = torch.rand(3, 2)
    assert all_gather_rows(rows) is rows
    assert on_main(lambda: "done") == "done"
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu0"])
def test_a_device_that_does_not_exist_is_named(name):
    with pytest.raises(ConfigError, match="device"):
        distributed.choose_device(name)


def test_one_gpu_for_every_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="every process on one GPU"):
        distributed.choose_device("cuda:1", local_rank=0)
