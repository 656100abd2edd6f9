"""Checkpoints that are a folder: each rank writes its shards, and any number of ranks reads them again.

The folder holds tensors (weights, states of the optimizers; torch's distributed checkpoint format), each under its name
in the module, and `meta.pt` with everything else as plain types. It knows nothing of how many ranks wrote it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_align.sharded_metadata import ListReader, read_list

META = "meta.pt"
WEIGHTS = "state_dict."
OPTIMIZERS = "optimizer_states"
TIED = "tied"
"""In `meta.pt`: weights that are written under another name, and that name."""


def write_shards(
    folder: Path,
    checkpoint: dict[str, Any],
    names: Sequence[Sequence[str]],
    tied: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the tensors of weights and optimizers; all ranks have to call it.

    Args:
        folder: There already.
        checkpoint: As Lightning made it.
        names: Of each optimizer's parameters, in its order.
        tied: See `tied_names`; these are written once.

    Returns:
        What is left for `meta.pt`.
    """
    meta = {key: value for key, value in checkpoint.items() if key not in ("state_dict", OPTIMIZERS)}
    weights = checkpoint["state_dict"]
    meta[TIED] = {name: first for name, first in (tied or {}).items() if name in weights and first in weights}
    tensors = {WEIGHTS + name: value for name, value in weights.items() if name not in meta[TIED]}
    if OPTIMIZERS in checkpoint:
        meta[OPTIMIZERS] = []
        for number, (state, own) in enumerate(zip(checkpoint[OPTIMIZERS], names, strict=True)):
            slots = {f"{own[i]}.{slot}": value for i, kept in state["state"].items() for slot, value in kept.items()}
            found = {slot: value for slot, value in slots.items() if isinstance(value, Tensor)}
            tensors |= {_optimizer(number) + slot: value for slot, value in found.items()}
            rest = {slot: value for slot, value in slots.items() if slot not in found}
            groups = [{**group, "params": [own[i] for i in group["params"]]} for group in state["param_groups"]]
            meta[OPTIMIZERS].append({"rest": rest, "param_groups": groups})
    dcp.save(tensors, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """Everything but the tensors."""
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def read_whole(folder: Path, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint as one process without ranks would have written it, on the CPU; no process group is needed."""
    meta, stored = read_meta(folder), _stored(folder)
    wanted = {key: kept for key, kept in stored.items() if optimizers or key.startswith(WEIGHTS)}
    tensors = {key: torch.empty(kept.size, dtype=kept.properties.dtype) for key, kept in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        _read(tensors, folder, no_dist=True)
    weights = {k.removeprefix(WEIGHTS): v for k, v in tensors.items() if k.startswith(WEIGHTS)}
    meta["state_dict"] = weights | {name: weights[first] for name, first in meta.pop(TIED, {}).items()}
    states = meta.pop(OPTIMIZERS, None)
    if optimizers and states is not None:
        meta[OPTIMIZERS] = [_numbered(state, _of(number, tensors)) for number, state in enumerate(states)]
    return meta


def read_weights(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in shards; all ranks have to call it.

    Args:
        folder: The checkpoint.
        like: What the module's `state_dict` gives; it names what is read, and how it is sharded.

    Returns:
        Under every name that the checkpoint has; empty where `like` has no such name.
    """
    sizes = {k.removeprefix(WEIGHTS): v.size for k, v in _stored(folder).items() if k.startswith(WEIGHTS)}
    tensors = {WEIGHTS + name: torch.empty_like(value) for name, value in like.items() if name in sizes}
    for name, size in sizes.items():
        if name in like and like[name].shape != size:
            raise ValueError(f"the checkpoint's {name} has shape {tuple(size)}; expected {tuple(like[name].shape)}")
    _read(tensors, folder)
    weights = {name: tensors.get(WEIGHTS + name, torch.empty(0)) for name in sizes}
    return weights | {name: weights[first] for name, first in read_meta(folder).get(TIED, {}).items()}


def read_optimizer(
    folder: Path, state: dict[str, Any], number: int, parameters: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state of an optimizer in shards, as its `load_state_dict` takes it; all ranks have to call it.

    Args:
        folder: The checkpoint.
        state: What `meta.pt` says of it.
        number: Which of the optimizers.
        parameters: Its parameters, by name.
    """
    tensors = {}
    for slot, kept in _of(number, _stored(folder)).items():
        like = parameters[slot.rpartition(".")[0]]
        whole = torch.Size(kept.size) != like.shape
        dtype = kept.properties.dtype
        tensors[_optimizer(number) + slot] = (
            torch.empty(kept.size, dtype=dtype) if whole else torch.empty_like(like, dtype=dtype, requires_grad=False)
        )
    _read(tensors, folder)
    return _numbered(state, _of(number, tensors))


def is_shard(value: Any) -> bool:
    """Whether a tensor is one of which each rank holds a part."""
    return isinstance(value, DTensor)


def in_shards(value: Any, like: Tensor) -> Any:
    """This rank's part of a tensor that it has whole, sharded like another of its shape; others stay as they are."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Without a source rank nothing is sent: every rank has the same file.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parameter_names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of an optimizer's parameters in its order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of parameters that the module has under an earlier name too, and that name."""
    first: dict[Tensor, str] = {}
    names = [(name, first.setdefault(p, name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: earlier for name, earlier in names if name != earlier}


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    return read_list(folder).state_dict_metadata  # type: ignore[return-value]


def _read(tensors: dict[str, Tensor], folder: Path, no_dist: bool = False) -> None:
    """Fills tensors from the shards, of which torch reads each with `weights_only=True`."""
    try:
        dcp.load(tensors, storage_reader=ListReader(folder), no_dist=no_dist)
    except CheckpointException as error:  # no `Exception`: it would end a process without a word of ours
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(f"{folder}: rank {rank} cannot read its shards, nothing was executed: {cause}") from error


def _optimizer(number: int) -> str:
    return f"optimizer_{number}."


def _of(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = _optimizer(number)
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _numbered(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state with parameters by number, as optimizers have it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    kept: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["rest"]}.items():
        name, _, slot = key.rpartition(".")
        kept.setdefault(numbers[name], {})[slot] = value
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": dict(sorted(kept.items())), "param_groups": groups}
