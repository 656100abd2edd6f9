"""Networks in shards (FSDP2): every rank holds a part of each weight, and layers are gathered while they compute.

Each decoder layer is a group that is gathered for its forward and its backward pass. What is left of the network
(embedding, last norm, vocabulary projection) is the root's group, gathered from the root's forward to its backward.
This library runs trunk and head as two calls, never the whole `model(...)`, so it says itself what a root's forward
is: whatever runs `through_root`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from lit_align.models.layers import decoder_layers
from lit_align.models.modes import base_model
from lit_align.models.scalar import ScalarHead
from lit_align.models.slices import Slice, empty_slices, fill_slices

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

RUN = "_run_through_root"
HELD = "_held_whole"
"""Marks a root that `unsharded` holds whole."""


@dataclass(frozen=True)
class Sharding:
    """How networks are sharded.

    Attributes:
        mesh: The ranks that share them, one dimension.
        bf16: Whether weights are gathered in bfloat16, over shards (and sums of gradients) in their own precision.
    """

    mesh: DeviceMesh
    bf16: bool = False


_current: list[Sharding] = []


@contextmanager
def building_in_shards(sharding: Sharding) -> Iterator[None]:
    """While open, the networks that are built come out in shards; all ranks have to build the same ones."""
    _current.append(sharding)
    try:
        yield
    finally:
        _current.pop()


def current_sharding() -> Sharding | None:
    """How a network that is built now is to be sharded; None = it stays whole."""
    return _current[-1] if _current else None


def is_sharded(model: nn.Module) -> bool:
    """Whether the network is in shards."""
    return hasattr(base_model(model), RUN)


def shard(model: PreTrainedModel, slices: Sequence[Slice]) -> None:
    """Shards a network as `building_in_shards` says, in place; does nothing outside of it.

    Args:
        model: Without a wrapper, adapters put on.
        slices: Of those of its weights that each rank has its rows of; the others are whole.

    Raises:
        ValueError: The architecture does not say what its layers are.
    """
    sharding = current_sharding()
    if sharding is None:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    empty_slices(slices)
    options = {"mesh": sharding.mesh, "mp_policy": _policy(model, sharding)}
    for head in [module for module in model.modules() if isinstance(module, ScalarHead)]:
        fully_shard(head, mesh=sharding.mesh)  # computes in its own precision
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    fill_slices(slices)
    setattr(model, RUN, MethodType(_run, model))
    register_fsdp_forward_method(model, RUN)


def _policy(model: PreTrainedModel, sharding: Sharding) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if sharding.bf16 else None,
        reduce_dtype=torch.promote_types(model.dtype, torch.float32),
        cast_forward_inputs=False,  # the embedding has the right type, and what follows it keeps it
    )


# -- the root's forward


def through_root(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes `function(model, ...)` a forward of the model: the root's weights are whole while it runs, and backward.

    What it returns carries the gradient; tensors or named tuples of tensors. For a model that is not sharded the
    function is called as it is.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        model: Any = args[0]
        forward = getattr(base_model(model), RUN, None)
        if forward is None:
            return function(*args, **kwargs)
        result = forward(functools.partial(function, *args, **kwargs))  # FSDP would look through arguments for tensors
        if not torch.is_grad_enabled():
            _rest(model)
        return result

    return run


def _run(self: nn.Module, function: Callable[[], Any]) -> Any:
    # Hooks hang on what is returned; on a view of something else they could get lost.
    return pytree.tree_map_only(Tensor, lambda t: t if t._base is None else t.clone(), function())


def _rest(model: nn.Module) -> None:
    """After a pass without gradient: back to shards, where FSDP would keep the root's group whole for a backward."""
    root: Any = base_model(model)
    if getattr(root, HELD, False):
        return
    if any(p.requires_grad for p in model.parameters()):
        root.reshard()  # its backward may still be to come
    else:
        root.reset_iter_state()  # and FSDP's list of passes, which only a backward would empty


def _nothing() -> None:
    pass


@contextmanager
def unsharded(*models: nn.Module | None) -> Iterator[None]:
    """While open, the models are whole on every rank, and their forward passes (without gradient) ask no other rank.

    So ranks may make as many passes as each needs. All ranks have to open it; there has to be room for the models.

    Args:
        *models: Sharded or not; None is passed over.
    """
    from torch.distributed.fsdp import FSDPModule

    roots: list[Any] = [base_model(model) for model in models if model is not None and is_sharded(model)]
    parts = [(root, [m for m in root.modules() if isinstance(m, FSDPModule)]) for root in roots]
    for root, groups in parts:
        setattr(root, HELD, True)
        getattr(root, RUN)(_nothing)  # FSDP takes for the root what runs first
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
    try:
        yield
    finally:
        for root, groups in parts:
            setattr(root, HELD, False)
            root.reset_iter_state()
            for group in groups:
                group.set_reshard_after_forward(group is not root, recurse=False)
