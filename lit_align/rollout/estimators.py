"""Advantage estimators: how good each sampled token was; small objects, chosen by class path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from lit_align.losses import masked_whiten
from lit_align.rollout.advantages import (
    broadcast_to_tokens,
    gae,
    grpo_advantages,
    reinforce_advantages,
    rloo_advantages,
    shaped_rewards,
    whiten_advantages,
)
from lit_align.rollout.experience import Rollout


class Advantages(NamedTuple):
    """What an estimator gives; all float32 [S, R], 0 outside the response mask.

    Attributes:
        advantages: Weight of each token in the policy loss.
        returns: What the critic is to predict; equal to `advantages` where there is no critic.
    """

    advantages: Tensor
    returns: Tensor


class AdvantageEstimator(ABC):
    """Turns scores of whole answers into advantages of tokens.

    Attributes:
        needs_critic: Whether the stage has to train a critic for it.
        min_answers: Least number of answers per prompt.
        uses_kl_coef: Whether the KL penalty is part of the reward.
    """

    needs_critic: ClassVar[bool]
    min_answers: ClassVar[int]
    uses_kl_coef: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, rollout: Rollout, kl_coef: float) -> Advantages:
        """Advantages of a whole global rollout; `kl_coef` weighs k1 in the reward."""


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) on rewards with the KL penalty inside.

    Attributes:
        gamma: Discount per token.
        lam: Decay of the temporal-difference errors; 1 = Monte-Carlo return minus value.
        whiten_rewards: Scale the shaped rewards to unit variance (their mean is kept).
        whiten: Shift and scale the advantages to mean 0, variance 1 over the whole rollout's tokens.
    """

    needs_critic: ClassVar[bool] = True
    min_answers: ClassVar[int] = 1

    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten: bool = True

    def __call__(self, rollout: Rollout, kl_coef: float) -> Advantages:
        """See the class; returns = unwhitened advantages + values."""
        mask = rollout.response_mask
        rewards = shaped_rewards(rollout.scores, rollout.logps, rollout.reference_logps, mask, kl_coef)
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, self.gamma, self.lam)
        return Advantages(whiten_advantages(advantages, mask) if self.whiten else advantages, returns)


@dataclass(frozen=True)
class RLOO(AdvantageEstimator):
    """Leave-one-out baseline (arXiv:2402.14740, eq. 7): an answer's reward minus the mean of the other answers'.

    The reward of an answer is its score minus `kl_coef` times its summed k1.
    """

    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 2

    def __call__(self, rollout: Rollout, kl_coef: float) -> Advantages:
        """The same advantage for all tokens of an answer."""
        rewards = rollout.scores - kl_coef * rollout.kl
        advantages = broadcast_to_tokens(rloo_advantages(rewards, rollout.num_answers), rollout.response_mask)
        return Advantages(advantages, advantages)


@dataclass(frozen=True)
class Reinforce(AdvantageEstimator):
    """No critic and no groups: an answer's reward, standardised over the whole rollout.

    The reward of an answer is its score minus `kl_coef` times its summed k1.
    """

    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 1

    def __call__(self, rollout: Rollout, kl_coef: float) -> Advantages:
        """The same advantage for all tokens of an answer."""
        advantages = reinforce_advantages(rollout.scores - kl_coef * rollout.kl)
        advantages = broadcast_to_tokens(advantages, rollout.response_mask)
        return Advantages(advantages, advantages)


@dataclass(frozen=True)
class GRPO(AdvantageEstimator):
    """Group-relative advantage (arXiv:2402.03300, section 4.1.2): an answer's score, standardised in its group.

    The KL penalty of the paper belongs to the loss: set the stage's `kl_loss_coef`. `kl_coef` is not used.
    """

    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 2
    uses_kl_coef: ClassVar[bool] = False

    def __call__(self, rollout: Rollout, kl_coef: float) -> Advantages:
        """The same advantage for all tokens of an answer."""
        advantages = grpo_advantages(rollout.scores, rollout.num_answers)
        advantages = broadcast_to_tokens(advantages, rollout.response_mask)
        return Advantages(advantages, advantages)
