"""The rollout of PPO: samples answers, scores them, and makes them examples of the update."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_align.batch import Example, PlannedLoader, PromptBatch
from lit_align.models.source import ModelSource
from lit_align.rollout.advantages import AdaptiveKL, FixedKL
from lit_align.rollout.estimators import AdvantageEstimator
from lit_align.rollout.experience import (
    Trajectory,
    as_examples,
    as_rollout,
    from_all_ranks,
    rollout_counts,
    rollout_metrics,
    with_tokens,
)
from lit_align.rollout.loader import RolloutLoader
from lit_align.rollout.moments import RunningMoments
from lit_align.rollout.rewards import RewardFunction, answer_scores
from lit_align.rollout.sampling import Answer, answer_noise
from lit_align.rollout.scoring import answer_logps, answer_values, micro_batches
from lit_align.stages.policy import ReferencedStage, reference_policy
from lit_align.stages.ppo_settings import PPOSettings
from lit_align.stages.stage import SchedulerCallable


class RolloutStage(ReferencedStage):
    """A stage whose epoch begins with answers that its policy samples; what the update is, a subclass says.

    Attributes:
        estimator: How advantages are estimated.
        ppo: The numbers of the algorithm.
        kl: Gives the weight of the KL in the reward.
        reward_model: Frozen; None = callables alone.
        reward_functions: Callables that judge answers.
        critic: Gives values; None = the estimator needs none.
        reward_moments: Running moments of all scores.
        rollout_seed: Of the uniform numbers that decide what is sampled.
        rollout_metrics: Figures of the newest rollout, logged with those of its updates.
        phase_seconds: Wall-clock seconds of this process spent on "rollout" (sampling) and "scoring" (rewards, and
            log-probabilities and values before the update), added up over the run; validation is not counted.
        rollout_counts: What this process sampled in the same time: "prompts", "prompt_tokens" (a prompt counted once,
            whatever the number of its answers), "answers", "sampled_tokens".
    """

    estimator: AdvantageEstimator
    ppo: PPOSettings
    kl: AdaptiveKL | FixedKL
    reward_functions: tuple[RewardFunction, ...]
    reward_moments: RunningMoments

    def __init__(self, policy: ModelSource, optimizer: OptimizerCallable, lr_scheduler: SchedulerCallable) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        self.reward_model: nn.Module | None = None
        self.critic: nn.Module | None = None
        self.rollout_seed, self.rollout_metrics = 0, dict[str, float]()
        self.phase_seconds = {"rollout": 0.0, "scoring": 0.0}
        self.rollout_counts: Counter[str] = Counter()

    def setup(self, stage: str) -> None:
        """Makes the prompts' data module yield experience instead of prompts."""
        super().setup(stage)
        if stage == "fit":
            self.rollout_seed = int(self.trainer.strategy.broadcast(torch.initial_seed())) % 2**63
            self.trainer.datamodule.collector = self._rollout_loader
            if not self.engine.uses_noise:
                rank_zero_warn(
                    f"engine {type(self.engine).__name__}: an answer depends on those that are sampled beside it, so a "
                    "resumed run, or one with other ranks, samples others than one run to its end; "
                    "`engine: Decode` does not"
                )

    def tokens_to_sample(self) -> int:
        """Those of an answer."""
        return self.sampling.max_new_tokens

    def collect(self, prompts: PromptBatch, number: int) -> list[Example]:
        """One rollout: samples answers to this rank's prompts, and makes all ranks' answers examples of the update.

        What is sampled depends on the seed, the number of the rollout and the prompt, not on the rank.

        Args:
            prompts: This rank's share of the rollout's prompts.
            number: Of the rollout, from 1.

        Returns:
            The examples of the whole rollout, the same on every rank, each token with its old log-probability,
            reference log-probability, old value, advantage and return.
        """
        # The loader is iterated outside Lightning's autocast; old log-probabilities must be those of the update.
        with self.trainer.precision_plugin.forward_context():
            trajectories = from_all_ranks(self._trajectories(prompts, number))
        rollout, ppo = as_rollout(trajectories), self.ppo
        scores = self.reward_moments.scaled(rollout.scores) if ppo.scale_rewards else rollout.scores
        advantages, returns = self.estimator(rollout._replace(scores=scores), self.kl.coef)
        coef = self.kl.coef if self.estimator.uses_kl_coef else 0.0
        judged = returns if self.estimator.needs_critic else None
        self.rollout_metrics = rollout_metrics(rollout, coef, judged, ppo.recomputes_logps)
        self.kl.update(float(rollout.kl.mean()), len(rollout.scores))
        numbers = {"advantages": advantages, "returns": returns}
        if not ppo.is_one_step:
            numbers["old_logps"] = rollout.logps
        return with_tokens(trajectories, rollout, **numbers)

    def _trajectories(self, batch: PromptBatch, number: int) -> list[Trajectory]:
        # A rank without prompts goes along: networks that are sharded are gathered by all ranks.
        with self._phase("rollout", number):
            answers = self._sampled(batch, number)
        with self._phase("scoring", number):
            return self._scored(batch, answers)

    def _sampled(self, batch: PromptBatch, number: int) -> list[tuple[Answer, ...]]:
        n = self.ppo.num_answers
        keys = [(self.rollout_seed, number, *prompt, answer) for prompt in _numbered(batch) for answer in range(n)]
        noise = answer_noise(keys, self.sampling.max_new_tokens) if keys else None
        answers = self.answers(batch.prompt_ids, n, noise=noise)
        if number:
            self.rollout_counts.update(rollout_counts(batch.prompt_ids, answers))
        return answers

    def _scored(self, batch: PromptBatch, answers: list[tuple[Answer, ...]]) -> list[Trajectory]:
        prompts, n, temperature = list(batch.prompt_ids), self.ppo.num_answers, self.sampling.temperature
        examples, budget = as_examples(prompts, answers), self.ppo.scoring_max_tokens
        packed = list(micro_batches(examples, budget, self.device, self.lay_out)) if examples else []
        scores = answer_scores(
            self.reward_model, self.reward_functions, self.tokenizer, prompts, answers, batch.records, packed
        )
        scores = self.ppo.final_scores(scores, [a.finished for group in answers for a in group]).reshape(-1, n)
        logps = [tuple(answer.logps for answer in group) for group in answers]
        if self.ppo.recomputes_logps:
            logps = _split(answer_logps(self.policy, packed, temperature), n)
        with reference_policy(self.policy, self.reference) as reference:
            reference_logps = _split(answer_logps(reference, packed, temperature), n)
        values = [tuple(torch.zeros_like(row) for row in group) for group in logps]
        if self.critic is not None:
            values = _split(answer_values(self.critic, packed), n)
        rows = zip(_numbered(batch), prompts, answers, scores, logps, reference_logps, values, strict=True)
        return [Trajectory(i, ids.cpu(), *numbers, repeat=repeat) for (i, repeat), ids, *numbers in rows]

    @contextmanager
    def _phase(self, name: str, number: int) -> Iterator[None]:
        """Adds the seconds that pass to the phase's; those of validation (rollout 0) are not counted."""
        start = time.perf_counter()
        yield
        if number:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.phase_seconds[name] += time.perf_counter() - start

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Adds the rollout's figures to those of its updates."""
        return means | self.rollout_metrics if self.trainer.training else means

    # -- validation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Records reward, KL, share of finished answers and length of one answer to each held-out prompt."""
        trajectories = self._trajectories(batch, number=0)
        if not trajectories:  # this rank has no share of the last, smaller batch
            return
        rollout = as_rollout(trajectories)
        count = len(rollout.scores)
        self.record(
            reward=(rollout.scores.sum(), count),
            kl=(rollout.kl.sum(), count),
            finished=(rollout.finished.float().sum(), count),
            length=(rollout.response_mask.float().sum(), count),
        )

    test_step = validation_step

    def _rollout_loader(self, prompts: PlannedLoader) -> RolloutLoader:
        largest = int(np.diff(prompts.plan(prompts.epoch).bounds).max())
        try:
            self.kl.check_episodes(largest * self.ppo.num_answers)
        except ValueError as error:
            raise ValueError(f"ppo.kl_horizon: {error}") from None
        return RolloutLoader(
            prompts,
            self.collect,
            ppo_epochs=self.ppo.ppo_epochs,
            num_minibatches=self.ppo.num_minibatches,
            micro_batches=self.trainer.accumulate_grad_batches,
            seed=prompts.seed,
            lay_out=self.lay_out,
        )


def _numbered(batch: PromptBatch) -> list[tuple[int, int]]:
    """What tells each prompt of a rollout from the others: its index, and how often the same one came before it."""
    return list(zip(batch.indices.tolist(), batch.repeats or (0,) * len(batch), strict=True))


def _split(rows: list[Tensor], n: int) -> list[tuple[Tensor, ...]]:
    return [tuple(rows[i : i + n]) for i in range(0, len(rows), n)]
