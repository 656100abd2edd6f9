"""Proximal policy optimisation (PPO) from rewards of sampled answers; RLOO and GRPO are other estimators of it.

One Lightning epoch is one iteration: `RolloutLoader` calls `collect`, which samples, scores and estimates
advantages, and then yields the micro-batches that `training_step` makes its clipped loss of.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_align.batch import Example, MicroBatch, PlannedLoader, PromptBatch
from lit_align.losses import clipped_policy_loss, clipped_value_loss, kl_estimates
from lit_align.models import scalar_at_sources, token_stats
from lit_align.models.checkpoint import ENTRY
from lit_align.models.load import load_scalar_model
from lit_align.models.modes import disable_dropout
from lit_align.models.reference import freeze, make_reference
from lit_align.models.source import ModelSource
from lit_align.rollout.estimators import GAE, AdvantageEstimator
from lit_align.rollout.experience import (
    Trajectory,
    as_examples,
    as_rollout,
    from_all_ranks,
    rollout_metrics,
    with_tokens,
)
from lit_align.rollout.loader import RolloutLoader
from lit_align.rollout.moments import RunningMoments
from lit_align.rollout.rewards import RewardFunction, answer_scores
from lit_align.rollout.sampling import Sampling, answer_noise
from lit_align.rollout.scoring import answer_logps, answer_values, check_vocabulary, micro_batches
from lit_align.stages.optim import WarmupCosine
from lit_align.stages.policy import ReferencedStage, reference_policy
from lit_align.stages.ppo_settings import PPOSettings
from lit_align.stages.stage import SchedulerCallable


class LitPPO(ReferencedStage):
    """Trains a policy on rewards of the answers that it samples, close to a frozen reference.

    Loss of a token: clipped policy loss (arXiv:1707.06347, eq. 7) + value_coef * clipped value loss, divided by the
    sampled tokens of the optimizer step. The reward of an answer (reward model and callables) stands on its last
    token, -kl_coef * (log pi_old - log pi_ref) on each. Old log-probabilities are computed by the training forward,
    so the first ratio is 1. Dropout is off. One epoch of the trainer is one rollout.

    Args:
        policy: Where the language model comes from.
        reward_model: Where the frozen reward model comes from; None = callables alone.
        reward_functions: Callables that judge answers; their weighted scores are added to the reward model's.
        critic: Where the critic comes from; None = where the reward model comes from, else the policy.
        reference: Where the frozen reference comes from; None = where the policy comes from (with LoRA: adapters off).
        estimator: How advantages are estimated, by class path: GAE (with a critic), RLOO, GRPO.
        ppo: The numbers of the algorithm.
        sampling: How answers are sampled.
        optimizer: Built from the trainable parameters: the policy's group, then the critic's.
        critic_lr: Peak learning rate of the critic; None = the optimizer's.
        lr_scheduler: Built from the optimizer and the number of steps of the run.
    """

    name = "ppo"
    trained: ClassVar[tuple[str, ...]] = ("policy", "critic")
    frozen: ClassVar[tuple[str, ...]] = ("reference", "reward_model")
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "loss/policy_avg",
        "loss/value_avg",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "val/clipfrac_avg",
        "val/ratio",
        "reward",
        "kl",
        "finished",
        "length",
    )
    progress: ClassVar[tuple[str, ...]] = ("loss", "objective/scores", "objective/kl", "reward")

    def __init__(
        self,
        policy: ModelSource,
        reward_model: ModelSource | None = None,
        reward_functions: list[RewardFunction] = [],  # noqa: B006 (never changed; jsonargparse shows it)
        critic: ModelSource | None = None,
        reference: ModelSource | None = None,
        estimator: AdvantageEstimator = GAE(),  # noqa: B008 (frozen)
        ppo: PPOSettings = PPOSettings(),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0),
        critic_lr: float | None = None,
        lr_scheduler: SchedulerCallable = lambda o, n: WarmupCosine(o, n),
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        if reward_model is None and not reward_functions:
            raise ValueError("nothing rewards the answers: set reward_model or reward_functions")
        if sampling.temperature == 0:
            raise ValueError("sampling.temperature: PPO needs samples, expected > 0, got 0")
        ppo.check_answers(estimator)
        self.reward_model_source, self.reward_functions = reward_model, tuple(reward_functions)
        self.critic_source, self.reference_source = critic or reward_model or policy, reference
        self.estimator, self.ppo, self.sampling, self.critic_lr = estimator, ppo, sampling, critic_lr
        self.kl, self.reward_moments = ppo.kl_controller(), RunningMoments()
        self.reward_model = self.critic = None
        self.rollout_seed, self.rollout_metrics = 0, dict[str, float]()

    def sources(self) -> dict[str, ModelSource]:
        """Policy's and critic's."""
        return {"policy": self.policy_source, "critic": self.critic_source}

    def configure_model(self) -> None:
        """Builds policy, reference, and, where needed, critic and reward model, once."""
        if self.policy is not None:
            return
        super().configure_model()
        disable_dropout(self.policy)
        self.reference = make_reference(self.policy, self.policy_source, self.reference_source)
        if self.estimator.needs_critic:
            self.critic = load_scalar_model(self.critic_source, "critic")
            disable_dropout(self.critic)
        if self.reward_model_source is not None:
            self.reward_model = freeze(load_scalar_model(self.reward_model_source.frozen(), "reward_model"))
            check_vocabulary(self.policy, self.reward_model)

    def setup(self, stage: str) -> None:
        """Makes the prompts' data module yield experience instead of prompts."""
        if stage == "fit":
            self.rollout_seed = int(self.trainer.strategy.broadcast(torch.initial_seed())) % 2**63
            self.trainer.datamodule.collector = self._rollout_loader

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's group, then the critic's."""
        groups = [{"params": [p for p in self.policy.parameters() if p.requires_grad]}]
        if self.critic is not None:
            rate = {} if self.critic_lr is None else {"lr": self.critic_lr}
            groups.append({"params": [p for p in self.critic.parameters() if p.requires_grad], **rate})
        return groups

    # -- the update

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Clipped policy and value loss of the micro-batch's tokens, as their share of the step's mean."""
        old = batch.tokens
        stats = token_stats(self.policy, batch, self.sampling.temperature, self.ppo.entropy_coef != 0)  # [N]
        policy = clipped_policy_loss(
            stats.logps,
            _column(old, "old_logps", stats.logps),
            _column(old, "advantages", stats.logps),
            self.ppo.clip_range,
            self.ppo.clip_range_high,
            self.ppo.dual_clip,
        )
        losses = policy.loss - self.ppo.entropy_coef * stats.entropy
        if self.ppo.kl_loss_coef:
            reference_logps = _column(old, "reference_logps", stats.logps)
            losses = losses + self.ppo.kl_loss_coef * kl_estimates(stats.logps, reference_logps, "k2")
        if self.critic is not None:
            value = clipped_value_loss(
                values := scalar_at_sources(self.critic, batch),
                _column(old, "old_values", values),
                _column(old, "returns", values),
                self.ppo.clip_range_value,
            )
            losses = losses + self.ppo.value_coef * value.loss
            self.record(**{"loss/value_avg": _sum(value.loss), "val/clipfrac_avg": _sum(value.clipped.float())})
        self._record_update(losses, policy, stats.logps - _column(old, "old_logps", stats.logps), stats.entropy)
        return self.scaled(losses.sum(), batch.totals.tokens)

    def _record_update(self, losses: Tensor, policy: Any, log_ratio: Tensor, entropy: Tensor) -> None:
        self.record(
            **{
                "loss": _sum(losses),
                "loss/policy_avg": _sum(policy.loss),
                "policy/approxkl_avg": _sum(0.5 * log_ratio.square()),
                "policy/clipfrac_avg": _sum(policy.clipped.float()),
                "policy/entropy_avg": _sum(entropy),
                "val/ratio": _sum(policy.ratio),
            }
        )

    # -- the rollout

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
        rollout = as_rollout(trajectories)
        scores = self.reward_moments.scaled(rollout.scores) if self.ppo.scale_rewards else rollout.scores
        advantages, returns = self.estimator(rollout._replace(scores=scores), self.kl.coef)
        coef = self.kl.coef if self.estimator.uses_kl_coef else 0.0
        self.rollout_metrics = rollout_metrics(rollout, coef, returns if self.estimator.needs_critic else None)
        self.kl.update(float(rollout.kl.mean()), len(rollout.scores))
        return with_tokens(trajectories, rollout, advantages=advantages, returns=returns)

    def _trajectories(self, batch: PromptBatch, number: int) -> list[Trajectory]:
        prompts, indices, n = list(batch.prompt_ids), batch.indices.tolist(), self.ppo.num_answers
        asked = zip(indices, batch.repeats or [0] * len(indices), strict=True)
        keys = [(self.rollout_seed, number, *prompt, answer) for prompt in asked for answer in range(n)]
        noise = answer_noise(keys, self.sampling.max_new_tokens) if keys else None
        flat = self.answer([ids for ids in prompts for _ in range(n)], self.sampling, noise)
        answers = [tuple(flat[i : i + n]) for i in range(0, len(flat), n)]
        packed = self._packed(as_examples(prompts, answers)) if prompts else []
        scores = answer_scores(
            self.reward_model, self.reward_functions, self.tokenizer, prompts, answers, batch.records, packed
        )
        scores = self.ppo.final_scores(scores, [answer.finished for answer in flat]).reshape(-1, n)
        logps = _split(answer_logps(self.policy, packed, self.sampling.temperature), n)
        with reference_policy(self.policy, self.reference) as reference:
            reference_logps = _split(answer_logps(reference, packed, self.sampling.temperature), n)
        values = [tuple(torch.zeros_like(row) for row in group) for group in logps]
        if self.critic is not None:
            values = _split(answer_values(self.critic, packed), n)
        rows = zip(indices, prompts, answers, scores, logps, reference_logps, values, strict=True)
        return [Trajectory(i, ids.cpu(), *numbers) for i, ids, *numbers in rows]

    def _packed(self, examples: list[Example]) -> list[MicroBatch]:
        return list(micro_batches(examples, self.ppo.scoring_batch_size, self.device, self.lay_out))

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

    # -- state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the next rollout depends on (KL coefficient, moments, seed) and the figures of this one."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ENTRY]["ppo"] = {
            "kl_coef": float(self.kl.coef),
            "reward_moments": self.reward_moments.as_dict(),
            "rollout_seed": self.rollout_seed,
            "rollout_metrics": dict(self.rollout_metrics),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts them back."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[ENTRY]["ppo"]
        self.kl.coef, self.rollout_seed = state["kl_coef"], state["rollout_seed"]
        self.reward_moments, self.rollout_metrics = RunningMoments(**state["reward_moments"]), state["rollout_metrics"]

    def _rollout_loader(self, prompts: PlannedLoader) -> RolloutLoader:
        return RolloutLoader(
            prompts,
            self.collect,
            ppo_epochs=self.ppo.ppo_epochs,
            num_minibatches=self.ppo.num_minibatches,
            micro_batches=self.trainer.accumulate_grad_batches,
            seed=prompts.seed,
            lay_out=self.lay_out,
        )


def _sum(values: Tensor) -> tuple[Tensor, int]:
    return values.sum(), len(values)


def _split(rows: list[Tensor], n: int) -> list[tuple[Tensor, ...]]:
    return [tuple(rows[i : i + n]) for i in range(0, len(rows), n)]


def _column(tokens: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    # A micro-batch without examples has no columns at all.
    return tokens[name] if len(like) else torch.zeros_like(like)
