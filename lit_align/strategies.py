"""FSDP2 for Lightning: `strategy: fsdp2` shards every network of a stage over all devices."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch.optim import Optimizer

from lit_align.models.sharding import Sharding, building_in_shards

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

    @property
    def shards(self) -> bool:
        """Whether there is more than one device to share the networks."""
        return self.world_size > 1

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

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While open, gradients are added up where they are; Lightning opens it for all but a step's last micro-batch."""
        from torch.distributed.fsdp import FSDPModule

        groups = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for group in groups:
            group.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for group in groups:
                group.set_requires_gradient_sync(True, recurse=False)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all devices", override=True)
