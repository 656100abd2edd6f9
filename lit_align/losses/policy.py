"""Losses of PPO, one value per token, and estimators of the KL divergence to the reference.

All of them are unreduced: the caller sums over the tokens of the policy and divides by their number in the whole
optimizer step (all micro-batches, all ranks).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_align.losses.checks import check_constant, check_range, check_same_shape

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before `exp`: e^20 is far beyond any clip range, and finite."""

KLKind = Literal["k1", "k2", "k3"]


class PolicyLoss(NamedTuple):
    """What `clipped_policy_loss` returns, all [N].

    Attributes:
        loss: To be minimised, one value per token.
        ratio: pi / pi_old of each token, detached.
        clipped: bool, True = a clip holds, so this token has no gradient (its mean is the "clip fraction").
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """What `clipped_value_loss` returns, all [N].

    Attributes:
        loss: Half the squared error, to be minimised, one value per token.
        clipped: bool, True = the clipped error is the larger one.
    """

    loss: Tensor
    clipped: Tensor


def clipped_policy_loss(
    token_logps: Tensor,
    old_token_logps: Tensor,
    advantages: Tensor,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate objective, per token.

    rho = exp(token_logps - old_token_logps)
    loss = max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range_high))             Eq. 7, arXiv:1707.06347
    and for A < 0 with dual clip c: min(loss, -c A)                                   arXiv:1912.09729
    A clip_range_high above clip_range is "clip-higher" (arXiv:2503.14476).

    Args:
        token_logps: Log-probability under the policy that is trained, float [N], nats.
        old_token_logps: The same under the policy that answered; float [N], constant.
        advantages: float [N], constant.
        clip_range: Lower distance from 1, in (0, 1].
        clip_range_high: Upper distance from 1, > 0; None = clip_range.
        dual_clip: Upper bound of the ratio for negative advantages, > 1; None = no bound.

    Returns:
        PolicyLoss(loss[N], ratio[N], clipped[N]); unreduced.

    Raises:
        ValueError: Shapes differ, a constant requires a gradient, or a coefficient is out of range.
    """
    check_same_shape(token_logps=token_logps, old_token_logps=old_token_logps, advantages=advantages)
    check_constant(old_token_logps=old_token_logps, advantages=advantages)
    high = clip_range if clip_range_high is None else clip_range_high
    check_range("clip_range", clip_range, 0, 1, with_high=True)
    check_range("clip_range_high", high, 0)
    ratio = (token_logps - old_token_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss, clipped = torch.maximum(free, held), held > free
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1)
        bound = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > bound)
        loss, clipped = torch.where(beyond, bound, loss), clipped | beyond
    return PolicyLoss(loss, ratio.detach(), clipped)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None = 0.2
) -> ValueLoss:
    """Half the squared error of the critic, with its step clipped around the values of the rollout.

    loss = 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)

    The clip is that of the PPO implementation for language models (arXiv:1909.08593, arXiv:2403.17031); it matters
    only when several steps are taken per rollout.

    Args:
        values: The critic's values, float [N].
        old_values: Its values at rollout time, float [N], constant.
        returns: Targets (unwhitened advantages + old values), float [N], constant.
        clip_range: > 0, in units of reward; None = no clip.

    Returns:
        ValueLoss(loss[N], clipped[N]); unreduced.

    Raises:
        ValueError: Shapes differ, a constant requires a gradient, or clip_range <= 0.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    check_constant(old_values=old_values, returns=returns)
    free = (values - returns).square()
    if clip_range is None:
        return ValueLoss(0.5 * free, torch.zeros_like(free, dtype=torch.bool))
    check_range("clip_range", clip_range, 0)
    step = values - old_values
    held = (old_values + step.clamp(-clip_range, clip_range) - returns).square()
    # Inside the range both are the same but for rounding, which is not to be counted as a clip.
    return ValueLoss(0.5 * torch.maximum(free, held), (held > free) & (step.abs() > clip_range))


def kl_estimates(token_logps: Tensor, reference_token_logps: Tensor, kind: KLKind = "k1") -> Tensor:
    """Estimates of KL(pi || pi_ref) from sampled tokens, one per token, in nats.

    d = token_logps - reference_token_logps;  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d
    (J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html)

    k1 and k3 are unbiased as *values*. As *objectives* they differ (on-policy, in expectation):

        k1 in the reward   gradient of KL(pi || pi_ref) of the sequence: PPO's default
        k2 in the loss     gradient of KL(pi || pi_ref) per token: the right one for a loss term
        k3 in the loss     gradient of KL(pi_ref || pi): the reverse direction
        k1 in the loss     zero: never
        k3 in the reward   biased, collapses to the unregularised policy: never

    Args:
        token_logps: Log-probability of the sampled tokens under the policy, float [N] (or any one shape).
        reference_token_logps: The same under the reference.
        kind: "k1", "k2" or "k3".

    Returns:
        float, shape of `token_logps`; differentiable. In k3 d is bounded below by -20, so that it stays finite.

    Raises:
        ValueError: The shapes differ or the kind is unknown.
    """
    check_same_shape(token_logps=token_logps, reference_token_logps=reference_token_logps)
    log_ratio = token_logps - reference_token_logps
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        log_ratio = log_ratio.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")
