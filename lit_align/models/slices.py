"""Reading networks in slices: every rank takes its own rows of each weight out of the files, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

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
        del model.config.distributed_config  # it is no part of what the network is
        return model

    name = "maybe_distribute_model"
    setattr(PreTrainedModel, name, classmethod(split))
    try:
        # Of size 1, so that transformers makes no mesh and no groups of its own.
        yield {"distributed_config": DistributedConfig(fsdp_size=1)}
    finally:
        delattr(PreTrainedModel, name)


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


def take_slices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Takes the slices out of a model, and leaves weights without contents but of full size in their place.

    Returns:
        The slices by every name that they have: a tied weight is one object under two names.
    """
    slices = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, DTensor)
    }
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in slices.items():
        if parameter not in empty:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            empty[parameter] = nn.Parameter(whole, parameter.requires_grad)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, empty[parameter])
    return slices
