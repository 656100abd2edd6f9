"""How much work a configuration is: steps, tokens, micro-batches, model FLOPs, and the least time that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_align.batch import Work
from lit_align.cli.situation import Load, Rollout, Situation, asks_reference
from lit_align.machine import Machine
from lit_align.models.flops import Flops, forward_flops, training_flops
from lit_align.models.memory import kv_bytes
from lit_align.stages import LitDPO, LitPPO
from lit_align.stages.stage import Stage

DEFAULT_EPOCHS = 1000
"""Of Lightning, where neither epochs nor steps are given."""


@dataclass(frozen=True)
class Workload:
    """The work of a run.

    Attributes:
        work: Of an optimizer step, over all ranks, on average.
        per_epoch: Optimizer steps of an epoch; None = not known.
        steps: Optimizer steps of the run; None = not known.
        counted: Whether the data was counted; else sizes are the largest that the settings allow.
        note: In words, where the numbers come from.
    """

    work: Work
    per_epoch: int | None
    steps: int | None
    counted: bool
    note: str


class Data:
    """Sizes of the training data, counted if that is cheap, else the largest that the settings allow.

    Args:
        data: The data module.
        stage: What is trained on it.
    """

    def __init__(self, data: LightningDataModule, stage: Stage) -> None:
        self.data, self.stage = data, stage
        self._known: dict[int, Any] = {}
        self.batch = int(getattr(data, "batch_size", None) or 0)
        self.longest = int(getattr(data, "max_length", None) or 1024)
        tokens = getattr(data, "max_tokens", None)
        self.batch = self.batch or (max(tokens // self.longest, 1) if tokens else 8)
        self.branches = 2 if stage.name in ("dpo", "rm") else 1

    def cost(self, parts: int) -> Any:
        """`train_cost` of the data module, for so many micro-batches a step; None = it cannot be counted cheaply."""
        if parts not in self._known:
            count = getattr(self.data, "train_cost", None)
            # Prompts are not laid out: ranks and micro-batches split what becomes of them.
            split = 1 if isinstance(self.stage, LitPPO) else parts
            self._known[parts] = None if count is None else count(world_size=split, micro_batches=1)
        return self._known[parts]

    def load(self, parts: int) -> Load:
        """The largest micro-batch of so many that share a step."""
        if isinstance(self.stage, LitPPO):
            return self._answers(parts, self.stage)
        cost = self.cost(parts)
        if cost is not None:
            return Load(cost.largest_tokens, math.ceil(cost.largest_scored), math.ceil(cost.longest_scored))
        tokens = math.ceil(self.batch / parts) * self.branches * self.longest
        return Load(tokens, tokens, self.branches * self.longest)

    def prompt(self) -> tuple[float, int]:
        """Mean and largest number of tokens of a prompt."""
        cost = self.cost(1)
        return (self.longest, self.longest) if cost is None else (cost.tokens / cost.examples, cost.longest)

    def _answers(self, parts: int, stage: LitPPO) -> Load:
        prompts = math.ceil(math.ceil(self.batch / stage.ppo.num_minibatches) / parts)
        scored = stage.ppo.num_answers * stage.sampling.max_new_tokens
        prompt = self.prompt()[1]
        padded = getattr(self.data, "layout", "packed") == "padded"
        tokens = prompt * (stage.ppo.num_answers if padded else 1) + scored
        return Load(prompts * tokens, prompts * scored, scored)

    def rollout(self, devices: int) -> Rollout | None:
        """What PPO does before its updates; None for other stages."""
        stage = self.stage
        if not isinstance(stage, LitPPO):
            return None
        prompts = math.ceil(self.batch / devices)
        answers = prompts * stage.ppo.num_answers
        rows = min(stage.sampling.batch_size, answers)
        longest, answer = self.prompt()[1], stage.sampling.max_new_tokens
        side = math.ceil(rows / stage.ppo.num_answers)
        return Rollout(rows, answers > rows, longest, answer, side, stage.ppo.scoring_max_tokens)

    def workload(self, trainer: Mapping[str, Any]) -> Workload:
        """Work of a step, and the number of steps."""
        cost, stage = self.cost(1), self.stage
        if isinstance(stage, LitPPO):
            work, per_epoch = self._update(stage), stage.ppo.ppo_epochs * stage.ppo.num_minibatches
        elif cost is not None:
            steps = cost.steps
            totals = (cost.examples, cost.sequences, cost.tokens, cost.tokens, cost.tokens, 0, cost.scored)
            work, per_epoch = Work(*(value / steps for value in (*totals, cost.attended))), steps
        else:
            count, size = self.batch * self.branches, self.longest
            tokens = count * size
            work, per_epoch = Work(self.batch, count, tokens, tokens, tokens, 0, tokens, count * size**2 / 2), None
        return Workload(work, per_epoch, _steps(per_epoch, trainer), cost is not None, self._note(cost))

    def _update(self, stage: LitPPO) -> Work:
        prompts, n = self.batch / stage.ppo.num_minibatches, stage.ppo.num_answers
        prompt, answer = self.prompt()[0], stage.sampling.max_new_tokens
        tokens = prompts * (prompt + n * answer)
        attended = prompts * (prompt**2 / 2 + n * (prompt * answer + answer**2 / 2))
        return Work(prompts, prompts * n, tokens, tokens, tokens, 0, prompts * n * answer, attended)

    def _note(self, cost: Any) -> str:
        answers = "; answers as long as they may be" if isinstance(self.stage, LitPPO) else ""
        if cost is not None:
            return f"counted from the data{answers}"
        return f"not counted: every example as long as it may be ({self.longest} tokens a sequence){answers}"


def _steps(per_epoch: int | None, trainer: Mapping[str, Any]) -> int | None:
    most, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    most = -1 if most is None else most
    if most >= 0 and epochs in (None, -1):
        return most
    if epochs == -1:  # without end
        return None
    limit, accumulate = trainer.get("limit_train_batches"), trainer.get("accumulate_grad_batches") or 1
    if per_epoch is None:
        if isinstance(limit, int) and epochs:
            per_epoch = limit // accumulate
        else:
            return most if most >= 0 else None
    elif isinstance(limit, int):
        per_epoch = min(per_epoch, limit // accumulate)
    elif isinstance(limit, float):
        per_epoch = int(per_epoch * limit)
    steps = per_epoch * (DEFAULT_EPOCHS if epochs is None else epochs)
    return steps if most < 0 else min(steps, most)


def step_flops(situation: Situation, stage: Stage) -> Flops:
    """What a unit of an optimizer step's work costs, as `Stage.step_flops`, of networks that were not loaded."""
    head = "ends" if stage.name == "rm" else "scored"
    cost = sum((training_flops(role.model, head) for role in situation.trained), Flops())
    if isinstance(stage, LitDPO) and asks_reference(stage):
        own = [role.model for role in situation.roles if role.name == "reference"]
        cost += forward_flops(own[0] if own else situation.trained[0].model, adapters=bool(own))
    return cost


@dataclass(frozen=True)
class Seconds:
    """Least seconds that a machine needs, at its full rate.

    Attributes:
        step: Of an optimizer step.
        rollout: Of sampling and scoring the answers of one rollout; 0 = there is none.
    """

    step: float
    rollout: float = 0.0


def seconds(situation: Situation, stage: Stage, data: Data, load: Workload, machine: Machine, moved: int) -> Seconds:
    """The floor of a step (docs/performance.md), and of a rollout.

    Args:
        situation: Networks and devices.
        stage: What is trained.
        data: What on.
        load: Its work.
        machine: One device.
        moved: Bytes that the update of one device moves.
    """
    n = situation.devices
    step = machine.floor(step_flops(situation, stage).of(load.work) / n, moved)
    if not isinstance(stage, LitPPO):
        return Seconds(step)
    return Seconds(step, _rollout_seconds(situation, stage, data, machine))


def _rollout_seconds(situation: Situation, stage: LitPPO, data: Data, machine: Machine) -> float:
    """Every sampled token reads all weights and half of the full cache, shared by the answers side by side."""
    rollout = data.rollout(situation.devices)
    assert rollout is not None
    policy, prompts = situation.trained[0], data.batch / situation.devices
    answers = prompts * stage.ppo.num_answers
    whole = data._update(stage)
    share = prompts / whole.examples
    work = Work(*(value * share for value in whole))
    sampling = forward_flops(policy.model).of(work) / machine.flops_per_second
    rounds = math.ceil(answers / rollout.rows) * rollout.answer
    cache = kv_bytes(policy.shape, rollout.rows, rollout.prompt + rollout.answer // 2)
    reading = rounds * (policy.weights.total_bytes + cache) / machine.bytes_per_second
    scoring = sum(
        forward_flops(role.model, "ends" if role.kind == "scalar" and not role.trained else "scored").of(work)
        for role in situation.roles
        if role is not policy or stage.ppo.recomputes_logps
    )
    if situation.lora and all(role.name != "reference" for role in situation.roles):
        scoring += forward_flops(policy.model, adapters=False).of(work)
    return max(sampling, reading) + scoring / machine.flops_per_second
