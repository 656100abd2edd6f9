"""A loader that follows the step plan and can be put back to any place of it.

It is a plain sized iterable around a `DataLoader`, so Lightning neither replaces its sampler nor shards it. Its
state is two numbers that are the same on every rank: the epoch and how many micro-batches it has handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lit_align.batch.plan import MicroPlan, plan_epoch


class PlannedLoader:
    """This rank's micro-batches, epoch after epoch, in the order of the step plan.

    Args:
        dataset: Gives the example of an index.
        collate: Makes a micro-batch from (examples, plan of the micro-batch).
        lengths: Unique tokens of each example, int [N].
        trained_weights: Sum of the weights of each example's scored tokens, float [N].
        batch_size: Examples per optimizer step over all ranks and micro-batches.
        rank: This process, in [0, world_size).
        world_size: Processes that share each step.
        micro_batches: Micro-batches that each process accumulates for a step.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the order.
        num_workers: Processes that prepare micro-batches; 0 = the training process itself.

    Attributes:
        epoch: The epoch of the micro-batch handed out last (0 before the first).
        seen: Micro-batches of this epoch already handed out.
    """

    def __init__(
        self,
        dataset: Sequence | Dataset,
        collate: Callable[[list, MicroPlan], Any],
        *,
        lengths: np.ndarray,
        trained_weights: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("the dataset holds no example, so there is nothing to load")
        self.dataset = _PlannedDataset(dataset, collate)
        self.lengths = np.asarray(lengths)
        self.trained_weights = np.asarray(trained_weights, dtype=np.float64)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.micro_batches, self.shuffle, self.seed = micro_batches, shuffle, seed
        self.num_workers = num_workers
        self.epoch = self.seen = 0
        self._restored = False

    def __len__(self) -> int:
        """Micro-batches of this rank per epoch (the same on every rank)."""
        return -(-len(self.lengths) // self.batch_size) * self.micro_batches

    def plans(self, epoch: int) -> list[MicroPlan]:
        """This rank's micro-batches of an epoch: part `m * world_size + rank` of each step for m = 0, 1, ..."""
        steps = plan_epoch(
            self.lengths,
            self.trained_weights,
            batch_size=self.batch_size,
            parts=self.world_size * self.micro_batches,
            shuffle=self.shuffle,
            seed=self.seed,
            epoch=epoch,
        )
        return [step[m * self.world_size + self.rank] for step in steps for m in range(self.micro_batches)]

    def __iter__(self) -> Iterator[Any]:
        # A generator reads the cursor at its first step, after a checkpoint has been restored.
        start = self._start()
        rest = self.plans(self.epoch)[start:]
        # A generator of its own: otherwise the loader draws from the global one and shifts dropout and sampling.
        loader = DataLoader(
            self.dataset,
            sampler=rest,
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )
        for batch in loader:
            self.seen += 1
            yield batch

    def _start(self) -> int:
        """Where this pass begins: where the checkpoint was, else at the start of an epoch not begun before."""
        if not (self._restored and self.seen < len(self)) and self.seen > 0:
            self.epoch, self.seen = self.epoch + 1, 0
        self._restored = False
        return self.seen

    def state_dict(self) -> dict[str, int]:
        """The cursor, the same on every rank."""
        return {"epoch": self.epoch, "seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Puts the cursor back; the next pass goes on from there instead of beginning an epoch."""
        self.epoch, self.seen = int(state["epoch"]), int(state["seen"])
        self._restored = True


class _PlannedDataset(Dataset):
    """Indexed by a plan instead of a number: an empty micro-batch and the step's totals need no side channel."""

    def __init__(self, examples: Sequence | Dataset, collate: Callable[[list, MicroPlan], Any]) -> None:
        self.examples, self.collate = examples, collate

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]

    def __getitem__(self, plan: MicroPlan) -> Any:
        return self.collate([self.examples[index] for index in plan.indices], plan)
