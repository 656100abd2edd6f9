"""From scores to advantages: reward placement, GAE, critic-free baselines, whitening, KL control.

Tensors are padded [S, R]: S responses, R response tokens. `response_mask` is bool, True = token that the policy
generated (its EOS included), False = padding or text of a tool. Entries outside the mask are never read: garbage and
nan there change nothing. Nothing here carries a gradient. Shapes that do not fit, masks that are not bool and
coefficients out of range raise ValueError with what was expected and what came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_align.losses.checks import check_mask, check_ndim, check_range, check_same_shape, full_precision
from lit_align.losses.masked import WHITEN_EPS, masked_mean, masked_whiten
from lit_align.losses.policy import kl_estimates

MAX_CHANGE = 0.2
"""Largest relative error of the KL that moves the adaptive coefficient in one update."""


@torch.no_grad()
def shaped_rewards(
    scores: Tensor, token_logps: Tensor, reference_token_logps: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Reward of each token: the KL penalty everywhere, the score at the response's last token.

    r_t = -kl_coef * (log pi_old(y_t) - log pi_ref(y_t)) + score * [t is the last True position]     arXiv:1909.08593

    Args:
        scores: Reward of each response, float [S].
        token_logps: Log-probabilities under the policy that sampled, float [S, R], nats.
        reference_token_logps: The same under the reference, float [S, R].
        response_mask: bool [S, R]. A row without True (an empty response) has no token to reward: all zeros.
        kl_coef: Weight of the KL penalty, >= 0.

    Returns:
        float [S, R], 0 outside the mask.

    Differs from arXiv:2403.17031: there the score stands one position later where there is room; at lambda < 1 that
    discounts it once more and trains a value on padding.
    """
    _check_rows(response_mask, token_logps=token_logps, reference_token_logps=reference_token_logps)
    _check_scores(scores, response_mask)
    check_range("kl_coef", kl_coef, 0, with_low=True)
    penalty = -kl_coef * kl_estimates(full_precision(token_logps), full_precision(reference_token_logps), "k1")
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, positions, -1).amax(dim=1, keepdim=True)
    rewards = torch.where(positions == last, penalty + scores.unsqueeze(1), penalty)
    return torch.where(response_mask, rewards, 0.0)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens of the policy.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V_t  Eq. 16, arXiv:1506.02438

    t + 1 is the *next token of the policy*: what lies between (padding, text of a tool) is stepped over, as if the
    response had no gap. After the last one V = A = 0, for truncated responses too.

    Args:
        rewards: float [S, R].
        values: V_t of the state before token t, float [S, R].
        response_mask: bool [S, R].
        gamma: Discount, in [0, 1].
        lam: Weight of longer look-ahead, in [0, 1]; 0 = TD error, 1 = Monte-Carlo return minus value.

    Returns:
        (advantages [S, R], returns [S, R]), 0 outside the mask; not whitened.
    """
    _check_rows(response_mask, rewards=rewards, values=values)
    check_range("gamma", gamma, 0, 1, with_low=True, with_high=True)
    check_range("lam", lam, 0, 1, with_low=True, with_high=True)
    rewards, values = full_precision(rewards), full_precision(values)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        inside = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(inside, values[:, t], next_value)
        advantages[:, t] = torch.where(inside, next_advantage, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


@torch.no_grad()
def whiten_advantages(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Advantages with mean 0 and (biased) variance 1 over the tokens of the policy: `masked_whiten`.

    Pass the whole rollout at once (all ranks gathered), once, before the epochs: whitened by rank or by minibatch,
    the update depends on how the rollout was split.

    Args:
        advantages: float [S, R].
        response_mask: bool [S, R].

    Returns:
        float [S, R], 0 outside the mask.
    """
    _check_rows(response_mask, advantages=advantages)
    return masked_whiten(advantages, response_mask)


@torch.no_grad()
def rloo_advantages(scores: Tensor, num_answers: int) -> Tensor:
    """REINFORCE leave-one-out: each score minus the mean score of the other answers to its query.

    A_i = s_i - sum_{j != i} s_j / (n - 1)                                                       arXiv:2402.14740

    Args:
        scores: Reward of each response (sequence KL penalty included, if any), float [S]; groups are consecutive.
        num_answers: Answers per query n, >= 2.

    Returns:
        float [S].
    """
    groups = _grouped(scores, num_answers)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (num_answers - 1)
    return (groups - others).flatten()


@torch.no_grad()
def grpo_advantages(scores: Tensor, num_answers: int, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages: scores standardised within the answers to one query.

    A_i = (s_i - mean(s)) / (std(s) + eps), with the unbiased std of the group                   arXiv:2402.03300

    Args:
        scores: Reward of each response, float [S]; groups are consecutive.
        num_answers: Answers per query n, >= 2.
        eps: Added to the std, > 0; a group of equal scores gets zeros.

    Returns:
        float [S].
    """
    groups = _grouped(scores, num_answers)
    check_range("eps", eps, 0)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # A rounded mean would leave a residue that dividing by the std of large equal scores turns into +-1.
    centred = centred - centred.mean(dim=1, keepdim=True)
    std = (centred.square().sum(dim=1, keepdim=True) / (num_answers - 1)).sqrt()
    return (centred / (std + eps)).flatten()


@torch.no_grad()
def reinforce_advantages(scores: Tensor) -> Tensor:
    """REINFORCE with one baseline for the whole rollout: scores whitened over all responses.

    A_i = (s_i - mean(s)) / sqrt(var(s) + 1e-8), over all S responses                            arXiv:2501.03262

    Needs no groups. Pass the whole rollout at once (all ranks gathered). The per-token form with the KL penalty in
    the reward is `gae` with zero values and lam = 1, whitened.

    Args:
        scores: Reward of each response, float [S].

    Returns:
        float [S].
    """
    check_ndim(1, scores=scores)
    return masked_whiten(scores, torch.ones_like(scores, dtype=torch.bool))


def broadcast_to_tokens(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """One advantage per response, given to each of its tokens: [S] to [S, R], 0 outside the mask.

    Args:
        advantages: float [S].
        response_mask: bool [S, R].

    Returns:
        float [S, R].
    """
    _check_rows(response_mask)
    _check_scores(advantages, response_mask)
    return torch.where(response_mask, advantages.unsqueeze(1), 0.0)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """How much of the returns' variance the critic predicts: 1 - Var(R - V) / Var(R), over the mask.

    Args:
        values: float [S, R].
        returns: float [S, R].
        response_mask: bool [S, R].

    Returns:
        Scalar, at most 1; 0 for a constant prediction, and by convention 0 when Var(R) <= 1e-8: nothing to explain.
    """
    _check_rows(response_mask, values=values, returns=returns)
    total = _masked_variance(returns, response_mask)
    unexplained = _masked_variance(returns - values, response_mask)
    return torch.where(total > WHITEN_EPS, 1 - unexplained / total, 0.0)


@dataclass
class KLController(ABC):
    """Says how strongly the KL penalty weighs. `coef` is its whole state: a plain float, to be checkpointed.

    Attributes:
        coef: The present weight of the KL penalty, >= 0.
    """

    coef: float = 0.05

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        check_range("coef", self.coef, 0, with_low=True)

    @abstractmethod
    def check_episodes(self, num_episodes: int) -> None:
        """Refuses rollouts of so many responses if `update` would; to be called before anything is sampled."""

    @abstractmethod
    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """To be called once per rollout, after its reward used the present `coef`.

        Args:
            kl_per_sequence: Mean over responses of the summed k1, in nats per *sequence*.
            num_episodes: Responses in the rollout, over all ranks.
        """


@dataclass
class FixedKL(KLController):
    """A KL coefficient that stays as it is."""

    def check_episodes(self, num_episodes: int) -> None:
        """Any number is fine."""

    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """Leaves `coef` as it is."""


@dataclass
class AdaptiveKL(KLController):
    """A KL coefficient that steers the KL to a target.

    e = clip(KL / target - 1, -0.2, 0.2);  coef <- coef (1 + e num_episodes / horizon)  Section 2.2, arXiv:1909.08593

    Attributes:
        target: Wanted KL in nats per *sequence*, > 0.
        horizon: Number of episodes over which the coefficient adapts; more than a fifth of a rollout's episodes, or
            the coefficient could change its sign.
    """

    coef: float = 0.2
    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("target", self.target, 0)
        check_range("horizon", self.horizon, 0)

    def check_episodes(self, num_episodes: int) -> None:
        """Refuses rollouts that are too large for the horizon."""
        if (least := MAX_CHANGE * num_episodes) >= self.horizon:
            raise ValueError(f"horizon must exceed {least:g} for {num_episodes} episodes a rollout, got {self.horizon}")

    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """Moves `coef` by at most 20 % per horizon."""
        self.check_episodes(num_episodes)
        error = min(max(float(kl_per_sequence) / self.target - 1, -MAX_CHANGE), MAX_CHANGE)
        self.coef *= 1 + error * num_episodes / self.horizon


def _masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def _grouped(scores: Tensor, num_answers: int) -> Tensor:
    check_ndim(1, scores=scores)
    check_range("num_answers", num_answers, 2, with_low=True)
    if len(scores) % num_answers:
        raise ValueError(f"scores must come in groups of {num_answers} answers, got {len(scores)} scores")
    return full_precision(scores).view(-1, num_answers)


def _check_rows(response_mask: Tensor, **tensors: Tensor) -> None:
    check_mask("response_mask", response_mask)
    check_ndim(2, response_mask=response_mask)
    check_same_shape(response_mask=response_mask, **tensors)


def _check_scores(scores: Tensor, response_mask: Tensor) -> None:
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(
            f"one number per response is needed: expected {tuple(response_mask.shape[:1])}, got {tuple(scores.shape)}"
        )
