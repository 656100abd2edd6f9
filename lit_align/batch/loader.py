"""A loader that follows the step plan and can be put back to any place of it.

It is a plain sized iterable around a `DataLoader`, so Lightning neither replaces its sampler nor shards it. Its
state is two numbers that are the same on every rank and do not depend on how steps are split: the epoch and how many
optimizer steps of it have been handed out. So a run goes on with other ranks or other micro-batches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_align.batch.plan import EpochPlan, MicroPlan, plan_epoch

STOPS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)}
"""Signals that clusters, and Ctrl-C in a terminal, send to all processes of a job, to stop it."""


class PlannedLoader:
    """This rank's micro-batches, epoch after epoch, in the order of the step plan.

    Args:
        dataset: Gives the example of an index.
        collate: Makes a micro-batch from (examples, plan of the micro-batch).
        lengths: Unique tokens of each example, int [N].
        trained_weights: Sum of the weights of each example's scored tokens, float [N].
        batch_size: Examples per optimizer step over all ranks and micro-batches.
        max_tokens: Instead of `batch_size`: unique tokens per optimizer step; see `plan_epoch`.
        rank: This process, in [0, world_size).
        world_size: Processes that share each step.
        micro_batches: Micro-batches that each process accumulates for a step.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the order.
        copies: How often an epoch visits each example, float [N]; None = once. See `epoch_order`.
        num_workers: Processes that prepare micro-batches; 0 = the training process itself.

    Attributes:
        epoch: The epoch of the micro-batch handed out last (0 before the first).
        seen: Micro-batches of this epoch already handed out.
        epoch_over: Says whether the trainer takes no more of this epoch, though a rest may be left
            (`limit_train_batches`); the stage, which knows the trainer, sets it.
        unfinished: Says whether the trainer has not been through the micro-batch handed out last; a checkpoint that is
            written then (after an exception) counts it as new. The stage sets it too.
    """

    def __init__(
        self,
        dataset: Sequence | Dataset,
        collate: Callable[[list, MicroPlan], Any],
        *,
        lengths: np.ndarray,
        trained_weights: np.ndarray,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        copies: np.ndarray | None = None,
        num_workers: int = 0,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("the dataset holds no example, so there is nothing to load")
        self.dataset = _PlannedDataset(dataset, collate)
        self.lengths = np.asarray(lengths)
        self.trained_weights = np.asarray(trained_weights, dtype=np.float64)
        self.batch_size, self.max_tokens, self.rank, self.world_size = batch_size, max_tokens, rank, world_size
        self.micro_batches, self.shuffle, self.seed, self.copies = micro_batches, shuffle, seed, copies
        self.num_workers = num_workers
        self.epoch = self.seen = 0
        self.epoch_over: Callable[[], bool] = bool
        self.unfinished: Callable[[], bool] = bool
        self._restored = False
        self._planned: tuple[int, EpochPlan] | None = None

    def __len__(self) -> int:
        """Micro-batches of this rank in the epoch that the next pass begins or goes on with (equal on every rank).

        It may differ from epoch to epoch if steps are given in tokens.
        """
        return len(self.plan(self._next_epoch())) * self.micro_batches

    def plan(self, epoch: int) -> EpochPlan:
        """The steps of an epoch, each with the micro-batches of all ranks."""
        if self._planned is None or self._planned[0] != epoch:
            plan = plan_epoch(
                self.lengths,
                self.trained_weights,
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
                parts=self.world_size * self.micro_batches,
                shuffle=self.shuffle,
                seed=self.seed,
                epoch=epoch,
                copies=self.copies,
            )
            self._planned = (epoch, plan)
        return self._planned[1]

    def __iter__(self) -> Iterator[Any]:
        # A generator reads the cursor at its first step, after a checkpoint has been restored.
        self.epoch, self.seen, self._restored = self._next_epoch(), self._next_seen(), False
        rest = _Rest(self.plan(self.epoch), self.rank, self.world_size, self.micro_batches, self.seen)
        # A generator of its own: otherwise the loader draws from the global one and shifts dropout and sampling.
        loader = DataLoader(
            self.dataset,
            sampler=rest,
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),
            worker_init_fn=outlive_sigterm,
        )
        with sigterm_held():  # until the workers can tell who sends it
            batches = iter(loader)
        for batch in batches:
            self.seen += 1
            yield batch

    def _goes_on(self) -> bool:
        """Whether the next pass goes on inside an epoch: only after a checkpoint was restored there."""
        return self._restored and self.seen < len(self.plan(self.epoch)) * self.micro_batches

    def _next_epoch(self) -> int:
        return self.epoch if self.seen == 0 or self._goes_on() else self.epoch + 1

    def _next_seen(self) -> int:
        return self.seen if self._goes_on() else 0

    def state_dict(self) -> dict[str, int]:
        """The cursor, the same on every rank; a step of which only some micro-batches were handed out counts as new."""
        if self.epoch_over():
            return {"epoch": self.epoch + 1, "step": 0}
        return {"epoch": self.epoch, "step": (self.seen - self.unfinished()) // self.micro_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Puts the cursor back; the next pass goes on from there instead of beginning an epoch."""
        self.epoch, self.seen = int(state["epoch"]), int(state["step"]) * self.micro_batches
        self._restored = True


@contextmanager
def sigterm_held() -> Iterator[None]:
    """Holds `STOPS` to this thread back, and lets the processes that are started meanwhile hold them back for good."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_sigterm(worker: int) -> None:
    """Lets a loader's process go on after a signal to all processes of a job, so that training still makes its step.

    A SIGTERM from the training process itself ends it as ever: that is how loaders are taken down.
    """
    if hasattr(signal, "sigwaitinfo"):  # where the sender of a signal can be told
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _Rest(Sampler):
    """The micro-batches of one rank that are left of an epoch: part `m * world_size + rank` of each step."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int, micro_batches: int, seen: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.micro_batches, self.seen = micro_batches, seen

    def __iter__(self) -> Iterator[MicroPlan]:
        first, skipped = divmod(self.seen, self.micro_batches)
        for step in range(first, len(self.plan)):
            parts = self.plan[step][self.rank :: self.world_size]
            yield from parts[skipped:] if step == first else parts


class _PlannedDataset(Dataset):
    """Indexed by a plan instead of a number: an empty micro-batch and the step's totals need no side channel."""

    def __init__(self, examples: Sequence | Dataset, collate: Callable[[list, MicroPlan], Any]) -> None:
        self.examples, self.collate = examples, collate

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]

    def __getitem__(self, plan: MicroPlan) -> Any:
        return self.collate([self.examples[index] for index in plan.indices], plan)
