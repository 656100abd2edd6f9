"""Proximal policy optimisation (PPO) from rewards of sampled answers; RLOO and GRPO are other estimators of it.

One Lightning epoch is one iteration: `RolloutLoader` calls `collect`, which samples, scores and estimates
advantages, and then yields the micro-batches that `training_step` makes its clipped loss of.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_align.batch import MicroBatch
from lit_align.losses import clipped_policy_loss, clipped_value_loss, kl_estimates
from lit_align.models import TokenStats, scalar_at_sources, token_loss
from lit_align.models.checkpoint import ENTRY
from lit_align.models.modes import disable_dropout
from lit_align.models.reference import freeze, make_reference
from lit_align.models.source import ModelSource
from lit_align.models.trunk import OwnWeights, SharedTrunk
from lit_align.rollout.engines import Decode, Engine
from lit_align.rollout.estimators import GAE, AdvantageEstimator
from lit_align.rollout.moments import RunningMoments
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.rollout.scoring import check_vocabulary
from lit_align.stages.optim import WarmupCosine
from lit_align.stages.ppo_settings import PPOSettings
from lit_align.stages.rollout import RolloutStage
from lit_align.stages.stage import SchedulerCallable


class LitPPO(RolloutStage):
    """Trains a policy on rewards of the answers that it samples, close to a frozen reference.

    Loss of a token: clipped policy loss (arXiv:1707.06347, eq. 7) + value_coef * clipped value loss, divided by the
    sampled tokens of the optimizer step. The reward of an answer (reward model and callables) stands on its last
    token, -kl_coef * (log pi_old - log pi_ref) on each. Where old log-probabilities come from, `ppo.old_logps` says; by
    default the first ratio is 1. Dropout is off. One epoch of the trainer is one rollout.

    Args:
        policy: Where the language model comes from.
        reward_model: Where the frozen reward model comes from; None = callables alone.
        reward_functions: Callables that judge answers; their weighted scores are added to the reward model's.
        critic: Where the critic comes from; None = where the reward model comes from, else the policy.
        reference: Where the frozen reference comes from; None = where the policy comes from (with LoRA: adapters off).
        shared_trunk: Whether critic and reward model are adapters and heads on the frozen base of a policy with LoRA,
            which then lies in memory once for all four roles; else each network has weights of its own.
        estimator: How advantages are estimated, by class path: GAE (with a critic), RLOO, GRPO.
        ppo: The numbers of the algorithm.
        sampling: How answers are sampled.
        engine: What samples them, by class path: Decode, Generate, ContinuousBatching, VLLM.
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
        shared_trunk: bool = False,
        estimator: AdvantageEstimator = GAE(),  # noqa: B008 (frozen)
        ppo: PPOSettings = PPOSettings(),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: Engine = Decode(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0, fused=True),
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
        self.critic_name = "critic" if critic or reward_model is None else "critic (not set, so begun as reward_model)"
        self.estimator, self.ppo, self.sampling, self.critic_lr = estimator, ppo, sampling, critic_lr
        self.engine, self.hold = engine, SharedTrunk(policy) if shared_trunk else OwnWeights()
        self.kl, self.reward_moments = ppo.kl_controller(), RunningMoments()

    def sources(self) -> dict[str, ModelSource]:
        """Policy's and critic's."""
        return {"policy": self.policy_source, "critic": self.hold.source_of(self.critic_source, self.critic_name)}

    def configure_model(self) -> None:
        """Builds policy, reference, and, where needed, critic and reward model, once."""
        if self.policy is not None:
            return
        super().configure_model()
        disable_dropout(self.policy)
        self.reference = make_reference(self.policy, self.policy_source, self.reference_source)
        if self.estimator.needs_critic:
            critic = self.critic_source.validate(self.critic_name, trained=True)
            self.critic = self.hold.scalar_model(self.policy, critic, self.critic_name)
            disable_dropout(self.critic)
        if self.reward_model_source is not None:
            source = self.reward_model_source.frozen()
            self.reward_model = freeze(self.hold.scalar_model(self.policy, source, "reward_model"))
            check_vocabulary(self.policy, self.reward_model)

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
        temperature, needs_entropy = self.sampling.temperature, self.ppo.entropy_coef != 0
        loss = token_loss(self.policy, batch, self._policy_loss, temperature, needs_entropy)
        if self.critic is not None:
            loss = loss + self.ppo.value_coef * self._value_loss(batch)
        self.record(loss=(loss, len(batch.scored)))
        return self.scaled(loss, batch.totals.tokens)

    def _policy_loss(self, stats: TokenStats, part: MicroBatch) -> Tensor:
        """Clipped loss, entropy bonus and KL penalty, summed over a part of the micro-batch's tokens."""
        old_logps = part.tokens.get("old_logps", stats.logps.detach())  # absent: this step's own are the old ones
        policy = clipped_policy_loss(
            stats.logps,
            old_logps,
            part.tokens["advantages"],
            self.ppo.clip_range,
            self.ppo.clip_range_high,
            self.ppo.dual_clip,
        )
        losses = policy.loss - self.ppo.entropy_coef * stats.entropy  # [N]
        if self.ppo.kl_loss_coef:
            losses = losses + self.ppo.kl_loss_coef * kl_estimates(stats.logps, part.tokens["reference_logps"], "k2")
        self.record(
            **{
                "loss/policy_avg": _sum(policy.loss),
                "policy/approxkl_avg": _sum(0.5 * (stats.logps - old_logps).square()),
                "policy/clipfrac_avg": _sum(policy.clipped.float()),
                "policy/entropy_avg": _sum(stats.entropy),
                "val/ratio": _sum(policy.ratio),
            }
        )
        return losses.sum()

    def _value_loss(self, batch: MicroBatch) -> Tensor:
        """Clipped value loss, summed over the micro-batch's tokens."""
        values = scalar_at_sources(self.critic, batch)  # [N]
        if len(values) == 0:  # a micro-batch without examples has no columns, and every parameter its zero
            return values.sum()
        old_values, returns = batch.tokens["old_values"], batch.tokens["returns"]
        value = clipped_value_loss(values, old_values, returns, self.ppo.clip_range_value)
        self.record(**{"loss/value_avg": _sum(value.loss), "val/clipfrac_avg": _sum(value.clipped.float())})
        return value.loss.sum()

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


def _sum(values: Tensor) -> tuple[Tensor, int]:
    return values.sum(), len(values)
