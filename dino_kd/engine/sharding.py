"""A network shared out over the processes of a job (FSDP2, arXiv 2304.11277), for large backbones.

Every process keeps its slice of every parameter, gradient, optimiser moment and teacher weight, and
gathers one transformer block at a time to compute with it. What is saved is whole, so that any
number of processes, one included, can go on from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_kd.distributed import device_mesh, is_main_process, is_sharded_tensor, world_size
from dino_kd.errors import ConfigError
from dino_kd.models.backbone import Backbone

T = TypeVar("T")
# 2.6 takes a second forward pass before the backward one, of the local crops, for a change of the
# weights that the first one used.
_NEEDED = "2.7"


def check_sharding(precision: str, optimizer: str, device: torch.device) -> None:
    """Raise ConfigError where this job cannot share a network out, before anything is built.

    Every process must call this.
    """
    if world_size() == 1:
        raise ConfigError(
            "optim.shard: a network is shared out over several processes, and this job is a "
            "single one; start it with torchrun --nproc_per_node=N -m dino_kd pretrain ..., or "
            "set optim.shard=false"
        )
    if precision == "fp16":
        raise ConfigError(
            "optim.shard: with optim.precision=fp16 the processes would not agree on the scale of "
            "the loss; use bf16 or fp32, or optim.shard=false"
        )
    if optimizer == "lars":
        raise ConfigError(
            "optim.shard: lars takes the norm of each whole parameter, which not every version of "
            "PyTorch gets right from slices; use optim.name=adamw or sgd, or optim.shard=false"
        )
    if torch.__version__ < _NEEDED:
        raise ConfigError(
            f"optim.shard: needs PyTorch {_NEEDED} or newer, this is {torch.__version__}; update "
            "it, or set optim.shard=false"
        )
    if not _averages(device):
        raise ConfigError(
            f"optim.shard: PyTorch {torch.__version__} cannot average gradients over slices on "
            f"{device.type} devices; update it (2.14 can, on CPUs too), or set optim.shard=false"
        )


def check_blocks(backbone: Backbone) -> None:
    """Raise ConfigError for a network that is not a row of transformer blocks."""
    if not (backbone.is_vit and _blocks(backbone)):
        raise ConfigError(
            f"optim.shard: {backbone.name} has no transformer blocks to share out; choose a ViT "
            "as model.backbone, or set optim.shard=false"
        )


def shard(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Share the parameters of backbones and heads out over all processes, in place.

    Each transformer block is gathered, used and dropped by itself; what lies outside the blocks
    (embeddings, norms, all of a head) is gathered by calling the module. Nothing may read the
    parameters outside of such a call but in slices. They reach `device` a block at a time, so that
    the whole network need not fit on it. Buffers stay whole.

    Args:
        modules: the same on every process. Optimisers are made afterwards.
        device: of this process.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = device_mesh(device)
    for module in modules:
        # Before FSDP2's own hook, which an in-place operation on a view would undo.
        module.register_forward_hook(lambda _, inputs, output: _no_view(output))
        for unit in [*_blocks(module), module]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)  # type: ignore[arg-type]


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of `module` is shared out."""
    return any(is_sharded_tensor(parameter) for parameter in module.parameters())


def drop_gathered(module: nn.Module) -> None:
    """Go back to the slices wherever a forward pass has left whole parameters behind.

    Older versions of PyTorch keep an outermost module gathered until its backward pass, and a
    teacher has none: its average would move a copy that is thrown away.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class WholeCopy:
    """Makes the whole network out of a sharded one, for what calls it between training steps.

    Such passes (features for k-NN) differ in number from process to process, and must not wait for
    each other; so the parameters are gathered once, before. Meanwhile every process holds them all.

    Args:
        module: not sharded yet; only its shapes and buffers are kept.
    """

    def __init__(self, module: nn.Module) -> None:
        empty: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            for p in module.parameters()
        }
        self._empty = copy.deepcopy(module, empty)
        self._module = module

    def instead(self, work: Callable[..., T]) -> Callable[..., T]:
        """`work` with the whole network in place of its first argument, the sharded one."""
        return lambda _, *args, **options: work(self(), *args, **options)

    def __call__(self) -> nn.Module:
        """A copy with the present weights, without gradients; every process must call this."""
        drop_gathered(self._module)
        state = {name: _whole(value) for name, value in self._module.state_dict().items()}
        made = copy.deepcopy(self._empty)
        made.load_state_dict(state, assign=True)
        return made.to(next(self._module.parameters()).device)


def gather(state: Any) -> Any:
    """A nested state with its sharded tensors whole, on the CPU of the main process.

    Every process must call this, with the same structure; the others get None for such a tensor.
    One tensor at a time is whole on the device. Everything else is passed on as it is.
    """
    if isinstance(state, Mapping):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather(value) for value in state)
    if not is_sharded_tensor(state):
        return state
    whole = state.full_tensor()
    return whole.detach().cpu() if is_main_process() else None


def slices_like(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of a state dict, cut like the parameters of `module` where it is sharded."""
    mine = module.state_dict()
    return {
        name: _slice_like(mine[name], value) if name in mine else value
        for name, value in state.items()
    }


def optimizer_slices(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same for an optimiser's state dict: what has its parameter's shape is cut like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        number: {
            key: _slice_like(parameters[number], value)
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": cut}


def _averages(device: torch.device) -> bool:
    """Whether the mean that FSDP2 asks for is one; every process must call this.

    Tried out, since the gloo of some versions (2.7) gives the sum without a word.
    """
    mean = torch.zeros(1, device=device)
    ones = torch.ones(world_size(), device=device)
    # `reduce_scatter_single` since 2.14, which warns of the older name.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(mean, ones, op=dist.ReduceOp.AVG)
    return mean.item() == 1.0


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = getattr(module.net, "blocks", None) if isinstance(module, Backbone) else None
    return list(blocks.children()) if isinstance(blocks, nn.Module) else []


def _no_view(output: Tensor) -> Tensor:
    return output.clone() if output._is_view() else output


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if is_sharded_tensor(value) else value.clone()  # type: ignore[attr-defined, operator]


def _slice_like(like: Any, whole: Tensor) -> Tensor:
    """This process's rows of `whole`, as a sharded tensor like `like`; `whole` where that is none.

    FSDP2 cuts the first dimension as `torch.chunk` does: the last processes may have fewer rows, or
    none.
    """
    if not is_sharded_tensor(like) or whole.shape != like.shape:
        return whole  # of a wrong shape: loading it says so
    from torch.distributed.tensor import DTensor

    start = sum(
        len(rows) for rows in whole.chunk(world_size())[: like.device_mesh.get_local_rank()]
    )
    rows = whole[start : start + len(like.to_local())]
    return DTensor.from_local(
        rows.to(like.device), like.device_mesh, like.placements,
        run_check=False, shape=whole.shape, stride=whole.stride(),
    )  # fmt: skip
