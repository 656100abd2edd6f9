"""The numbers of PPO, with the defaults of the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_align.rollout.advantages import AdaptiveKL, FixedKL
from lit_align.rollout.estimators import AdvantageEstimator
from lit_align.rollout.scoring import SCORED_TOKENS


@dataclass(frozen=True)
class PPOSettings:
    """The numbers of the algorithm.

    Attributes:
        ppo_epochs: Passes over each rollout.
        num_minibatches: Optimizer steps per pass.
        num_answers: Answers sampled per prompt.
        clip_range: The ratio is clipped to [1 - clip_range, 1 + clip_range_high].
        clip_range_high: None = clip_range.
        dual_clip: Bound on the loss of tokens with negative advantage, in units of it (arXiv:1912.09729); None = off.
        clip_range_value: How far a value may move from its old one before its gradient stops; None = no limit.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        kl_coef: Weight of k1, per token, in the reward.
        target_kl: If set, `kl_coef` adapts to keep the KL of a sequence at this many nats (arXiv:1909.08593, sec. 2.2).
        kl_horizon: Episodes over which it adapts.
        kl_loss_coef: Weight of k2, per token, in the loss: the gradient of the KL itself; for GRPO.
        missing_eos_penalty: Taken off the score of an answer that did not end by itself.
        reward_clip: Scores are clipped to [-reward_clip, reward_clip]; None = not.
        scale_rewards: Whether scores, once clipped, are divided by the running standard deviation of all scores of
            the run (arXiv:2307.04964, section 5.3.1, without its shift). What is logged is not scaled.
        old_logps: Where the old log-probabilities, those of the ratio and of the KL in the reward, come from.
            "recompute": from a forward of the policy as in training, once a rollout. "sampled": from the engine, as it
            drew the tokens; saves that forward, and where the engine computes otherwise than training (vLLM, bfloat16)
            the ratio is against the distribution that was sampled from. "auto": "recompute", but where a rollout is
            one optimizer step (ppo_epochs = num_minibatches = 1) the update's own log-probabilities are the old ones,
            so its ratios are exactly 1, and the KL in the reward is the engine's.
        scoring_max_tokens: Tokens (a prompt counted once for its answers) that are scored side by side.
    """

    ppo_epochs: int = 4
    num_minibatches: int = 1
    num_answers: int = 1
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = 3.0
    clip_range_value: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_coef: float = 0.05
    target_kl: float | None = None
    kl_horizon: float = 10_000.0
    kl_loss_coef: float = 0.0
    missing_eos_penalty: float = 1.0
    reward_clip: float | None = 10.0
    scale_rewards: bool = False
    old_logps: Literal["auto", "recompute", "sampled"] = "auto"
    scoring_max_tokens: int = SCORED_TOKENS

    @property
    def is_one_step(self) -> bool:
        """Whether a rollout is one optimizer step: its log-probabilities are the old ones then."""
        return self.old_logps == "auto" and self.ppo_epochs == self.num_minibatches == 1

    @property
    def recomputes_logps(self) -> bool:
        """Whether old log-probabilities come from a forward of their own."""
        return self.old_logps == "recompute" or (self.old_logps == "auto" and not self.is_one_step)

    def kl_controller(self) -> AdaptiveKL | FixedKL:
        """Fixed, or adaptive if there is a target."""
        if self.target_kl is None:
            return FixedKL(self.kl_coef)
        return AdaptiveKL(self.kl_coef, self.target_kl, self.kl_horizon)

    def check_answers(self, estimator: AdvantageEstimator) -> None:
        """Refuses fewer answers per prompt than the estimator compares."""
        if self.num_answers < estimator.min_answers:
            raise ValueError(
                f"ppo.num_answers: {type(estimator).__name__} compares answers to one prompt and needs at least "
                f"{estimator.min_answers}, got {self.num_answers}"
            )

    def final_scores(self, scores: Tensor, finished: Sequence[bool]) -> Tensor:
        """Scores, float32 [S], less the penalty of answers that did not end by themselves, clipped."""
        scores = scores - self.missing_eos_penalty * torch.tensor([float(not end) for end in finished])
        return scores if self.reward_clip is None else scores.clamp(-self.reward_clip, self.reward_clip)
