"""Reading networks in slices: every rank takes its own rows of each weight out of the files, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

HEAD = "score"
Item = TypeVar("Item")


@contextmanager
def reading_slices(mesh: DeviceMesh) -> Iterator[dict[str, Any]]:
    """While open, `from_pretrained` with the yielded options makes every weight a DTensor of this rank's rows.

    transformers reads of a file what a DTensor holds; which weights are DTensors is settled between the building of
    the empty network and the reading, by the method that is exchanged here.
    """

    def split(cls: type, model: PreTrainedModel, *_: Any) -> PreTrainedModel:
        _make_empty_slices(model, mesh)
        _agree_on_missing(model)
        del model.config.distributed_config  # it is no part of what the network is
        return model

    name = "maybe_distribute_model"
    setattr(PreTrainedModel, name, classmethod(split))
    try:
        # Of size 1, so that transformers makes no mesh and no groups of its own.
        yield {"distributed_config": DistributedConfig(fsdp_size=1)}
    finally:
        delattr(PreTrainedModel, name)


def _agree_on_missing(model: Any) -> None:
    """Lets all ranks make new weights where one has to: they draw them together.

    A weight of another shape may have slices of the right shape on some of the ranks.
    """
    name = "_move_missing_keys_from_meta_to_device"
    move = getattr(model, name)

    def of_all(missing: set[str], *options: Any) -> None:
        delattr(model, name)  # of this model, this once
        move(of_all_ranks(missing), *options)

    setattr(model, name, of_all)


def _make_empty_slices(model: nn.Module, mesh: DeviceMesh) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if module is getattr(model, HEAD, None):  # too small to slice; and a new one is drawn as everywhere else
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(_empty_slice(parameter, mesh), parameter.requires_grad)
            setattr(module, name, made[parameter])


def _empty_slice(like: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    rows = like.chunk(mesh.size())  # as FSDP splits: the last ranks may have fewer, or none
    rank = mesh.get_local_rank()
    own = rows[rank] if rank < len(rows) else like[:0]
    return DTensor.from_local(
        own.contiguous(), mesh, (Shard(0),), run_check=False, shape=like.shape, stride=like.stride()
    )


def make_whole(module: nn.Module) -> None:
    """Gathers the slices of a module's own weights; all ranks have to call it."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, DTensor):
            setattr(module, name, nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad))


def of_all_ranks(items: Iterable[Item]) -> set[Item]:
    """What any rank has; all ranks have to call it."""
    gathered: list[set[Item]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, set(items))
    return set().union(*gathered)


class Slice(NamedTuple):
    """This rank's rows of one weight, and whose weight it is."""

    module: nn.Module
    name: str
    value: nn.Parameter


def hide_slices(model: nn.Module) -> list[Slice]:
    """Takes the slices out of a model; in their place it gets weights of full size that take no memory.

    Adapters are made to the size of the weights that they find, and slices would be taken for the whole.

    Returns:
        A tied weight stands there once for each of its names.
    """
    slices = [
        Slice(module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    _exchange(slices, lambda like: torch.empty((), dtype=like.dtype).expand(like.shape))
    return slices


def empty_slices(slices: Sequence[Slice]) -> None:
    """Gives the model weights of full size without contents, as FSDP takes them before they are loaded."""
    _exchange(slices, lambda like: torch.empty(like.shape, dtype=like.dtype, device="meta"))


def fill_slices(slices: Sequence[Slice]) -> None:
    """Puts the slices into a model that was sharded with empty ones."""
    for module, name, value in slices:
        setattr(module, name, value.requires_grad_(getattr(module, name).requires_grad))


def _exchange(slices: Sequence[Slice], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, value in slices:
        if value not in made:
            made[value] = nn.Parameter(make(value), getattr(module, name).requires_grad)
        setattr(module, name, made[value])
