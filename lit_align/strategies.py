"""FSDP2 for Lightning: `strategy: fsdp2` shards every network of a stage over all devices."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch.optim import Optimizer

from lit_align.background_io import BackgroundCheckpointIO
from lit_align.checkpoint_io import WholeFolder, remove_folder
from lit_align.models.sharding import Sharding, building_in_shards
from lit_align.models.unpickling import nothing_executed
from lit_align.sharded_checkpoint import (
    OPTIMIZERS,
    in_shards,
    is_shard,
    parameter_names,
    read_meta,
    read_optimizer,
    read_weights,
    tied_names,
    write_shards,
)

PRECISIONS = ("32-true", "bf16-mixed")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states of every network over all devices of all hosts.

    With `precision: bf16-mixed` layers compute in bfloat16, gathered from float32 shards, and gradients are summed in
    float32; with `32-true` everything is as the networks' own `dtype` says. On one device nothing is sharded.

    Args:
        **options: Of Lightning's `ModelParallelStrategy` (`timeout`, `process_group_backend`).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, **options)
        self._folder: Path | None = None

    @property
    def shards(self) -> bool:
        """Whether there is more than one device to share the networks."""
        return self.world_size > 1

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def setup_environment(self) -> None:
        """Starts the processes' group; all of the devices shard."""
        self._check_precision()
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _check_precision(self) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:
            mend = "; for weights in bfloat16 set `dtype: bfloat16` of the policy and precision 32-true"
            raise ValueError(
                f"trainer.precision: strategy fsdp2 takes {' or '.join(PRECISIONS)}; got {precision}"
                + (mend if precision == "bf16-true" else "")
            )

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """While open, the networks that a stage builds come out in shards."""
        with self._building():
            yield

    def _building(self) -> AbstractContextManager[None]:
        if not self.shards:
            return nullcontext()
        bf16 = self.precision_plugin.precision == "bf16-mixed"
        return building_in_shards(Sharding(self.device_mesh["data_parallel"], bf16))

    def setup(self, trainer: Trainer) -> None:
        """Sets the optimizers up.

        Raises:
            ValueError: Weights are whole: each rank would train its own; or checkpoints were to be written in the
                background.
        """
        if self.shards and isinstance(self.checkpoint_io, BackgroundCheckpointIO):
            raise ValueError(
                "checkpoint_async: under fsdp2 every rank writes its shards, and training waits for the slowest; leave "
                "checkpoint_async out, or use strategy ddp"
            )
        whole = [n for n, p in self._module.named_parameters() if p.requires_grad and not is_shard(p)]
        if self.shards and whole:
            raise ValueError(
                f"trainer.strategy: fsdp2 found {len(whole)} weights that are not in shards ({whole[0]}, ...); build "
                "networks inside `configure_model`, with the functions of lit_align.models.load"
            )
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While open, ranks add up their own gradients; Lightning opens it for all but a step's last micro-batch."""
        from torch.distributed.fsdp import FSDPModule

        groups = [module for module in self._module.modules() if isinstance(module, FSDPModule)]
        for group in groups:
            group.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for group in groups:
                group.set_requires_gradient_sync(True, recurse=False)

    # -- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for the optimizers' states after the checkpoint was accepted."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What training changes, in shards."""
        return self._module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, in shards."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a folder to which each rank adds its shards; it gets its name when all of it is on the disk."""
        if not self.shards:
            ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        folder = WholeFolder(Path(self.broadcast(filepath)))
        if self.is_global_zero:
            folder.begin()
        self.barrier()
        names = [parameter_names(self._module, optimizer) for optimizer in self.optimizers]
        meta = write_shards(folder.part, checkpoint, names, tied_names(self._module))
        if self.is_global_zero:
            folder.finish(meta)
        self.barrier()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Removes a folder or a file."""
        if self.is_global_zero and Path(filepath).is_dir():
            remove_folder(Path(filepath))
        else:
            super().remove_checkpoint(filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what the stage has to accept; weights follow, from a folder or a file of any number of ranks."""
        path = Path(self.broadcast(checkpoint_path))
        self._folder = path if self.shards and path.is_dir() else None
        with nothing_executed(path):  # whatever `weights_only` says
            if self._folder is not None:
                return read_meta(path)
            if not self.shards:
                return self.checkpoint_io.load_checkpoint(path)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Puts the weights into the module."""
        module, like = self._module, self._module.state_dict()
        if self._folder is not None:
            values = read_weights(self._folder, like)
        else:
            values = {n: in_shards(v, like[n]) if n in like else v for n, v in checkpoint["state_dict"].items()}
        module.load_state_dict(values, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Puts the states into the optimizers."""
        parameters = dict(self._module.named_parameters())
        for number, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint[OPTIMIZERS], strict=True)):
            own = {name: parameters[name] for name in parameter_names(self._module, optimizer)}
            if self._folder is not None:
                optimizer.load_state_dict(read_optimizer(self._folder, state, number, own))
                continue
            likes = list(own.values())
            kept = {i: {s: in_shards(v, likes[i]) for s, v in slots.items()} for i, slots in state["state"].items()}
            optimizer.load_state_dict({**state, "state": kept})


def refuse_fsdp1(strategy: Any) -> None:
    """Refuses FSDP of the first generation, whatever way it is written.

    Raises:
        ValueError: Names what to use.
    """
    name = getattr(strategy, "class_path", strategy)
    if isinstance(name, str) and (name.startswith("fsdp_") or name.split(".")[-1] in ("fsdp", "FSDPStrategy")):
        raise ValueError(
            f"trainer.strategy: {name} is FSDP of the first generation, which flattens weights and cannot clip their "
            "gradients' norm; use strategy fsdp2 (--config configs/trainer/fsdp.yaml; on two processes of a CPU "
            "configs/trainer/fsdp_cpu2.yaml)"
        )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all devices", override=True)
