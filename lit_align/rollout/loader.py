"""The loop of PPO as Lightning sees it: one epoch is one rollout and the minibatches made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lit_align.batch import Example, MicroBatch, PlannedLoader, PromptBatch, epoch_order, pack, plan_step


def check_at_rollout_end(checkpoint: dict[str, Any]) -> None:
    """Refuses a Lightning checkpoint from inside an epoch: its rollout is gone, and another one would be trained on.

    Raises:
        ValueError: With what to do instead.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is not None and not progress["is_last_batch"]:
        raise ValueError(
            "this checkpoint was written in the middle of a rollout, which it does not hold; go on from one that was "
            "written at the end of an epoch (ModelCheckpoint with every_n_epochs, the default)"
        )


class RolloutLoader:
    """Rolls out when iterated, then yields this rank's micro-batches of the update.

    It is sized, because Lightning prefetches one batch from an unsized iterable, and would begin the next rollout
    before the last update.

    Args:
        prompts: Gives the prompts of one rollout as this rank's micro-batches of one of its steps.
        collect: Rolls out: makes the examples of the update, the whole global rollout on every rank, in the same
            order.
        ppo_epochs: Passes over the rollout.
        num_minibatches: Optimizer steps per pass; the rollout is split in as many near-equal parts.
        micro_batches: Micro-batches that each rank accumulates for an optimizer step.
        seed: Of the order of each pass.
    """

    def __init__(
        self,
        prompts: PlannedLoader,
        collect: Callable[[list[PromptBatch]], Sequence[Example]],
        *,
        ppo_epochs: int,
        num_minibatches: int,
        micro_batches: int,
        seed: int = 0,
    ) -> None:
        smallest = min(prompts.batch_size, len(prompts.lengths) % prompts.batch_size or prompts.batch_size)
        if smallest < num_minibatches:
            raise ValueError(
                f"num_minibatches = {num_minibatches}, but a rollout may hold only {smallest} prompts; "
                "lower num_minibatches, or choose a batch_size that leaves no small rest of the dataset"
            )
        self.prompts, self.collect = prompts, collect
        self.ppo_epochs, self.num_minibatches = ppo_epochs, num_minibatches
        self.micro_batches, self.seed = micro_batches, seed
        self._stream: Iterator[PromptBatch] | None = None

    def __len__(self) -> int:
        """Micro-batches of this rank per rollout."""
        return self.ppo_epochs * self.num_minibatches * self.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        batches = [self._next_prompts() for _ in range(self.prompts.micro_batches)]
        # The cursor tells this rollout from every other one, also after a resume.
        rollout = self.prompts.epoch * len(self.prompts) + self.prompts.seen
        examples = self.collect(batches)
        lengths = np.array([len(example) for example in examples])
        weights = np.array([example.trained_weight for example in examples])
        rank, world = self.prompts.rank, self.prompts.world_size
        for ppo_epoch in range(self.ppo_epochs):
            number = rollout * self.ppo_epochs + ppo_epoch
            order = epoch_order(len(examples), shuffle=True, seed=self.seed, epoch=number)
            for minibatch in np.array_split(order, self.num_minibatches):
                parts = plan_step(minibatch, lengths, weights, world * self.micro_batches)
                for micro in range(self.micro_batches):
                    plan = parts[micro * world + rank]
                    yield pack([examples[i] for i in plan.indices], plan.indices, plan.totals)

    def _next_prompts(self) -> PromptBatch:
        if self._stream is None:
            self._stream = iter(self.prompts)
        try:
            return next(self._stream)
        except StopIteration:
            self._stream = iter(self.prompts)
            return next(self._stream)
