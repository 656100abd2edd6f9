"""The reward model's pairwise loss and the likelihood term of chosen responses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import chosen_nll, pairwise_reward_loss


def test_it_is_the_plain_pairwise_logloss():
    """-logsigmoid(rewards_chosen - rewards_rejected).mean(), as the reward-model stage is commonly written."""
    chosen = torch.randn(16, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(16, dtype=torch.float64, requires_grad=True)
    loss = pairwise_reward_loss(chosen, rejected).mean()
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    assert_close(loss, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert_close(gradients, torch.autograd.grad(expected, (chosen, rejected)), rtol=0, atol=0)


def test_equal_rewards_give_ln_2():
    rewards = torch.tensor([0.0, 3.0, -7.5])
    assert (pairwise_reward_loss(rewards, rewards) == torch.tensor(math.log(2))).all()


def test_margin_and_centring_by_hand():
    """c = 2, r = 1, margin .5: -log s(.5) = .474077; centring .01 * 3^2 = .09."""
    loss = pairwise_reward_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5]), center_coef=0.01)
    assert_close(loss, torch.tensor([0.474077 + 0.09]), rtol=0, atol=1e-6)


def test_the_chosen_reward_is_pushed_up_and_the_rejected_one_down():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    pairwise_reward_loss(chosen, rejected).sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


def test_a_large_gap_stays_finite():
    loss = pairwise_reward_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert loss.item() == 1000.0


@pytest.mark.parametrize("wrong", ["rejected", "margin"])
def test_columns_are_refused_instead_of_broadcast(wrong):
    arguments = {"chosen": torch.zeros(4), "rejected": torch.zeros(4), "margin": torch.zeros(4)}
    arguments[wrong] = arguments[wrong][:, None]
    with pytest.raises(ValueError, match=rf"{wrong}.*expected \(4,\), got \(4, 1\)"):
        pairwise_reward_loss(**arguments)


def test_a_negative_centring_coefficient_is_refused():
    with pytest.raises(ValueError, match="center_coef"):
        pairwise_reward_loss(torch.zeros(2), torch.zeros(2), center_coef=-0.1)


def test_chosen_nll_averages_each_response_over_its_own_tokens():
    """-(-6 / 3) = 2 and -(-5 / 2) = 2.5: the short response weighs as much as the long one."""
    nll = chosen_nll(torch.tensor([-6.0, -5.0]), torch.tensor([3.0, 2.0]))
    assert nll.tolist() == [2.0, 2.5]


def test_chosen_nll_of_a_response_without_tokens_is_zero():
    assert chosen_nll(torch.zeros(1), torch.zeros(1)).item() == 0


def test_chosen_nll_refuses_columns():
    with pytest.raises(ValueError, match="chosen_lengths"):
        chosen_nll(torch.zeros(3), torch.ones(3, 1))
