"""Losses on pairs that are plain functions: the reward model's, and the likelihood term that DPO may add."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.losses.checks import check_ndim, check_range, check_same_shape
from lit_align.losses.preference.base import per_token


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coef: float = 0.0
) -> Tensor:
    """Pairwise logistic loss of a reward model, one value per pair.

    loss = -log s(r_w - r_l - margin) + center_coef (r_w + r_l)^2

    Bradley-Terry: Eq. 1, arXiv:2203.02155; margin: Eq. 2, arXiv:2307.09288; centring: arXiv:2312.09244. Equal rewards
    give ln 2.

    Args:
        chosen: Reward of the preferred response, float [B].
        rejected: Reward of the other response, float [B].
        margin: By how much chosen should win, float [B]; None = 0.
        center_coef: Weight of the pull of r_w + r_l towards 0, >= 0.

    Returns:
        float [B], unreduced.

    Raises:
        ValueError: The tensors are not all [B], or center_coef < 0.
    """
    check_ndim(1, chosen=chosen)
    check_same_shape(chosen=chosen, rejected=rejected)
    check_range("center_coef", center_coef, 0, with_low=True)
    difference = chosen - rejected
    if margin is not None:
        check_same_shape(chosen=chosen, margin=margin)
        difference = difference - margin
    loss = -logsigmoid(difference)
    return loss + center_coef * (chosen + rejected).square() if center_coef else loss


def chosen_nll(policy_chosen: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of each chosen response: -log pi(y_w | x) / |y_w|.

    The likelihood term of RPO (arXiv:2404.19733, where its weight is alpha): it keeps chosen responses likely while
    DPO widens the margin. Averaged per pair, not over the tokens of all pairs, so each pair weighs the same.

    Args:
        policy_chosen: log pi(y_w | x), summed, float [B], nats.
        chosen_lengths: Number of tokens summed over, [B].

    Returns:
        float [B], unreduced, nats per token.

    Raises:
        ValueError: The tensors are not both [B].
    """
    check_ndim(1, policy_chosen=policy_chosen)
    check_same_shape(policy_chosen=policy_chosen, chosen_lengths=chosen_lengths)
    return -per_token(policy_chosen, chosen_lengths)
