"""The loop of PPO as Lightning sees it: one epoch is one rollout and the minibatches made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lit_align.batch import (
    Example,
    LayOut,
    MicroBatch,
    MicroPlan,
    PlannedLoader,
    PromptBatch,
    epoch_order,
    pack,
    plan_step,
)
from lit_align.rollout.saved import pack_examples, unpack_examples

Collect = Callable[[PromptBatch, int], Sequence[Example]]
"""Rolls out: from this rank's share of the prompts and the number of the rollout to the examples of the update, those
of the whole global rollout, the same on every rank in the same order."""


class RolloutLoader:
    """Rolls out when iterated, then yields this rank's micro-batches of the update.

    It is sized, because Lightning prefetches one batch from an unsized iterable, and would begin the next rollout
    before the last update. Its state holds the rollout while only a part of its steps is done, so a run can be stopped
    and resumed at every step, with other ranks or micro-batches too.

    Args:
        prompts: Gives the prompts of one rollout as one micro-batch per rank.
        collect: Rolls out.
        ppo_epochs: Passes over the rollout.
        num_minibatches: Optimizer steps per pass; the rollout is split in as many near-equal parts.
        micro_batches: Micro-batches that each rank accumulates for an optimizer step.
        seed: Of the order of each pass.
        lay_out: Makes a micro-batch of examples, as `pack` does.

    Attributes:
        seen: Micro-batches of this rollout already handed out.
        epoch_over: Says whether the trainer takes no more of this rollout, though a rest may be left
            (`limit_train_batches`); the stage, which knows the trainer, sets it.
        unfinished: Says whether the trainer has not been through the micro-batch handed out last; a checkpoint that is
            written then (after an exception) counts it as new. The stage sets it too.
    """

    def __init__(
        self,
        prompts: PlannedLoader,
        collect: Collect,
        *,
        ppo_epochs: int,
        num_minibatches: int,
        micro_batches: int,
        seed: int = 0,
        lay_out: LayOut = pack,
    ) -> None:
        sizes = np.diff(prompts.plan(prompts.epoch).bounds)
        if (smallest := int(sizes.min())) < num_minibatches:
            raise ValueError(
                f"num_minibatches = {num_minibatches}, but a rollout may hold only {smallest} prompts; "
                "lower num_minibatches, or choose a batch_size that leaves no small rest of the dataset"
            )
        self.prompts, self.collect = prompts, collect
        self.ppo_epochs, self.num_minibatches = ppo_epochs, num_minibatches
        self.micro_batches, self.seed, self.lay_out = micro_batches, seed, lay_out
        self.seen = 0
        self.epoch_over: Callable[[], bool] = bool
        self.unfinished: Callable[[], bool] = bool
        self._cursor: dict[str, int] | None = None
        self._saved: dict[str, Any] | None = None
        self._examples: Sequence[Example] = []
        self._number = 0
        self._restored = False
        self._stream: Iterator[PromptBatch] | None = None

    def __len__(self) -> int:
        """Micro-batches of this rank per rollout."""
        return self.ppo_epochs * self.num_minibatches * self.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        # A generator reads the state at its first step, after a checkpoint has been restored.
        if not self._restored:
            self._roll_out()
        self._restored = False
        for plan in self._plans(first_step=self.seen // self.micro_batches):
            self.seen += 1
            yield self.lay_out([self._examples[i] for i in plan.indices], plan.indices, plan.totals)

    def _roll_out(self) -> None:
        self._cursor = self.prompts.state_dict()  # until they are answered, the prompts count as not handed out
        prompts, self._examples = self._next_prompts(), []
        # The cursor tells this rollout from every other one, also after a resume.
        self._number = self.prompts.epoch * len(self.prompts.plan(self.prompts.epoch)) + self.prompts.seen
        self._examples, self.seen, self._saved = self.collect(prompts, self._number), 0, None
        self._cursor = None

    def _plans(self, first_step: int) -> Iterator[MicroPlan]:
        """This rank's micro-batches of the rollout's optimizer steps, from the given step on."""
        lengths = np.array([len(example) for example in self._examples])
        weights = np.array([example.trained_weight for example in self._examples])
        rank, world = self.prompts.rank, self.prompts.world_size
        for step in range(first_step, self.ppo_epochs * self.num_minibatches):
            ppo_epoch, part = divmod(step, self.num_minibatches)
            number = self._number * self.ppo_epochs + ppo_epoch
            order = epoch_order(len(self._examples), shuffle=True, seed=self.seed, epoch=number)
            minibatch = np.array_split(order, self.num_minibatches)[part]
            yield from plan_step(minibatch, lengths, weights, world * self.micro_batches)[rank::world]

    def _next_prompts(self) -> PromptBatch:
        if self._stream is None:
            self._stream = iter(self.prompts)
        try:
            return next(self._stream)
        except StopIteration:
            self._stream = iter(self.prompts)
            return next(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """The cursor of the prompts, and the rollout if steps of it are left; the same on every rank."""
        state: dict[str, Any] = {"prompts": self._cursor or self.prompts.state_dict()}
        done = self.seen - self.unfinished()
        if self._examples and done < len(self) and not self.epoch_over():
            # Made once a rollout: Lightning asks for the state twice, and tensors that are shared are written once.
            self._saved = self._saved or pack_examples(self._examples)
            state["rollout"] = {
                "number": self._number,
                "step": done // self.micro_batches,
                "split": [self.ppo_epochs, self.num_minibatches],
                "examples": self._saved,
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts everything back; the next pass goes on inside the rollout, or begins one.

        Raises:
            ValueError: The rollout was to be split in other steps.
        """
        self.prompts.load_state_dict(state["prompts"])
        self._stream, self._cursor, self._examples = None, None, []
        self.seen, self._restored = 0, False
        if rollout := state.get("rollout"):
            now = [self.ppo_epochs, self.num_minibatches]
            if rollout["split"] != now:
                raise ValueError(
                    "the checkpoint was written inside a rollout with ppo_epochs, num_minibatches = "
                    f"{rollout['split']}, now they are {now}; restore them, or resume from the end of a rollout"
                )
            self._examples, self._saved = unpack_examples(rollout["examples"]), None
            self._number = int(rollout["number"])
            self.seen, self._restored = int(rollout["step"]) * self.micro_batches, True
