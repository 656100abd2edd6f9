"""Rewards, advantages, baselines and KL control: numbers by hand, special cases, and what padding may not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.losses import masked_whiten
from lit_align.rollout.advantages import (
    AdaptiveKL,
    FixedKL,
    broadcast_to_tokens,
    explained_variance,
    gae,
    grpo_advantages,
    reinforce_advantages,
    rloo_advantages,
    shaped_rewards,
    whiten_advantages,
)

GARBAGE = [0.0, 999.0, -math.inf, math.nan]


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers])


def everything(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


# ---- reward placement


def rewards_of(score: float, *mask: bool, kl_coef: float = 0.0, log_ratio: float = 0.0) -> list[float]:
    zeros = torch.zeros(1, len(mask))
    return shaped_rewards(torch.tensor([score]), zeros + log_ratio, zeros, row(*mask), kl_coef)[0].tolist()


@pytest.mark.parametrize(
    ("mask", "rewards"),
    [
        ((True, True, True), [0, 0, 3]),  # the last slot is the end
        ((True, True, False), [0, 3, 0]),  # ends before the padding
        ((True, False, False), [3, 0, 0]),  # the end is the first token
        ((False, True, True), [0, 0, 3]),  # padded on the left
        ((True, False, True), [0, 0, 3]),  # a tool spoke in between
        ((True,), [3]),  # a single token
        ((False, False, False), [0, 0, 0]),  # an empty response has no token to reward
    ],
)
def test_the_score_stands_on_the_last_token_of_the_policy(mask, rewards):
    assert rewards_of(3.0, *mask) == rewards


def test_a_score_of_zero_is_a_score():
    assert rewards_of(0.0, True, True, False, kl_coef=0.1, log_ratio=0.5) == pytest.approx([-0.05, -0.05, 0])


def test_the_kl_penalty_is_on_every_token_of_the_policy_and_lowers_the_reward_where_the_policy_is_likelier():
    """-0.1 * (-1 - -1.5) = -.05; -0.1 * (-2 - -1) = +.1; the last one takes the score of 2."""
    logps, reference = row(-1.0, -2.0, -0.5, 7.0), row(-1.5, -1.0, -0.5, -7.0)
    rewards = shaped_rewards(torch.tensor([2.0]), logps, reference, row(True, True, True, False), kl_coef=0.1)
    assert_close(rewards, row(-0.05, 0.1, 2.0, 0.0))


def test_each_response_gets_its_own_score():
    mask = torch.tensor([[True, False], [True, True]])
    rewards = shaped_rewards(torch.tensor([1.0, 2.0]), torch.zeros(2, 2), torch.zeros(2, 2), mask, 0.0)
    assert rewards.tolist() == [[1, 0], [0, 2]]


def test_the_score_on_the_end_is_discounted_once_less_than_on_the_padding_behind_it():
    """T = 3, V = 0, lambda .95: [.9025, .95, 1], not [.857375, .9025, .95]."""
    mask = row(True, True, True, False)
    rewards = shaped_rewards(torch.ones(1), torch.zeros(1, 4), torch.zeros(1, 4), mask, 0.0)
    advantages, _ = gae(rewards, torch.zeros(1, 4), mask, lam=0.95)
    assert_close(advantages, row(0.9025, 0.95, 1.0, 0.0))


# ---- generalised advantage estimation


def test_gae_by_hand():
    rewards, values = row(-0.01, -0.02, 0.03, 1.0), row(0.1, 0.2, 0.3, 0.4)
    advantages, returns = gae(rewards, values, everything(1, 4), gamma=1.0, lam=0.95)
    assert_close(advantages, row(0.79775, 0.745, 0.7, 0.6))
    assert_close(returns, row(0.89775, 0.945, 1.0, 1.0))


def test_lambda_1_without_values_is_the_monte_carlo_return():
    rewards = torch.randn(3, 6)
    _, returns = gae(rewards, torch.zeros(3, 6), everything(3, 6), gamma=1.0, lam=1.0)
    assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


def test_lambda_0_is_the_td_error():
    advantages, _ = gae(row(1.0, 1.0, 1.0), row(0.5, 0.5, 0.5), everything(1, 3), gamma=0.9, lam=0.0)
    assert_close(advantages, row(1 + 0.45 - 0.5, 1 + 0.45 - 0.5, 1 - 0.5))


def test_gamma_discounts_what_comes_later():
    _, returns = gae(row(0.0, 0.0, 1.0), torch.zeros(1, 3), everything(1, 3), gamma=0.5, lam=1.0)
    assert returns.tolist() == [[0.25, 0.5, 1.0]]


def test_a_gap_is_stepped_over_as_if_it_were_not_there():
    """Zeroing the gap's value instead would give .755191, .689675 before it."""
    mask = row(True, True, False, True, True)
    advantages, _ = gae(row(0.0, 0.0, 0.0, 0.0, 1.0), row(0.1, 0.2, 999.0, 0.3, 0.4), mask, lam=0.95)
    assert_close(advantages, row(0.799675, 0.7365, 0.0, 0.67, 0.6), rtol=0, atol=1e-6)
    compacted, _ = gae(row(0.0, 0.0, 0.0, 1.0), row(0.1, 0.2, 0.3, 0.4), everything(1, 4), lam=0.95)
    assert_close(advantages[mask], compacted[0], rtol=0, atol=0)


def test_a_truncated_response_is_not_continued_by_the_value_behind_it():
    advantages, _ = gae(row(0.0, 1.0, 0.0), row(0.0, 0.0, 5.0), row(True, True, False), lam=1.0)
    assert advantages.tolist() == [[1, 1, 0]]


def test_an_empty_response_has_no_advantages():
    for part in gae(row(5.0, 5.0), row(5.0, 5.0), row(False, False)):
        assert part.tolist() == [[0, 0]]


def test_nothing_carries_a_gradient():
    live = torch.randn(2, 3, requires_grad=True)
    advantages, returns = gae(live, live, everything(2, 3))
    rewards = shaped_rewards(live[:, 0], live, live, everything(2, 3), 0.1)
    assert not advantages.requires_grad and not returns.requires_grad and not rewards.requires_grad


# ---- what padding may not do


def padded(numbers: Tensor, lengths: list[int], side: str, width: int, fill: float) -> Tensor:
    """Rows of the first `lengths` numbers, padded to `width` with `fill`."""
    out = torch.full((len(lengths), width), fill)
    for i, length in enumerate(lengths):
        out[i, :length] = numbers[i, :length]
    return out if side == "right" else torch.stack([r.roll(width - n) for r, n in zip(out, lengths, strict=True)])


def pipeline(side: str, width: int, garbage: float) -> list[Tensor]:
    """Shaped rewards -> GAE -> whitening of ragged responses, in one layout; only the tokens of the policy are kept."""
    lengths, generator = [4, 1, 6, 3], torch.Generator().manual_seed(3)
    scores = torch.randn(4, generator=generator)
    tables = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    mask = padded(torch.ones(4, 6), lengths, side, width, 0.0).bool()
    logps, reference, values = (padded(table, lengths, side, width, garbage) for table in tables)
    rewards = shaped_rewards(scores, logps, reference, mask, kl_coef=0.3)
    rewards = torch.where(mask, rewards, garbage)
    advantages, returns = gae(rewards, values, mask)
    variance = explained_variance(values, torch.where(mask, returns, garbage), mask)
    whitened = whiten_advantages(torch.where(mask, advantages, garbage), mask)
    for table in (advantages, returns, whitened):
        assert (table[~mask] == 0).all()
    return [rewards[mask], advantages[mask], returns[mask], whitened[mask], variance]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_neither_side_nor_width_nor_content_of_padding_changes_anything(side, width, garbage):
    expected = pipeline("right", 6, 0.0)
    assert_close(pipeline(side, width, garbage), expected, rtol=1e-6, atol=1e-6)


# ---- whitening


def test_whitening_is_that_of_the_losses_over_the_whole_rollout():
    advantages, mask = torch.randn(4, 5), torch.rand(4, 5) > 0.3
    whitened = whiten_advantages(advantages, mask)
    assert_close(whitened, masked_whiten(advantages, mask), rtol=0, atol=0)
    by_row = torch.cat([whiten_advantages(a[None], m[None]) for a, m in zip(advantages, mask, strict=True)])
    assert (whitened - by_row).abs().max() > 0.1


# ---- critic-free advantages


def test_rloo_by_hand():
    """[1, 2, 6]: 1 - 4, 2 - 3.5, 6 - 1.5."""
    assert rloo_advantages(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3).tolist() == [-3.0, -1.5, 4.5, 0, 0, 0]


def test_grpo_by_hand():
    """[0, 0, 1, 1]: mean .5, unbiased std .57735."""
    advantages = grpo_advantages(torch.tensor([0.0, 0.0, 1.0, 1.0]), 4)
    assert_close(advantages, torch.tensor([-0.866024, -0.866024, 0.866024, 0.866024]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("level", [0.0, 0.1, 1000.1, -98765.4])
def test_a_group_of_equal_scores_teaches_nothing(level):
    """Standardising must not blow the rounding of the mean up to +-1."""
    scores = torch.full((6,), level)
    assert_close(rloo_advantages(scores, 3), torch.zeros(6), rtol=0, atol=1e-6 * max(1.0, abs(level)))
    assert_close(grpo_advantages(scores, 3), torch.zeros(6), rtol=0, atol=1e-6)


def test_groups_do_not_see_each_other():
    scores = torch.randn(6)
    for estimator in (rloo_advantages, grpo_advantages):
        parts = torch.cat([estimator(part, 3) for part in scores.split(3)])
        assert_close(estimator(scores, 3), parts, rtol=0, atol=0)


def test_reinforce_whitens_over_all_responses():
    advantages = reinforce_advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert_close(advantages, torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416]), rtol=0, atol=5e-5)


def test_one_advantage_per_response_reaches_each_of_its_tokens():
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert broadcast_to_tokens(torch.tensor([2.0, -1.0]), mask).tolist() == [[2, 2, 0], [0, -1, -1]]


@pytest.mark.parametrize("estimator", [rloo_advantages, grpo_advantages])
def test_groups_that_do_not_fit_are_refused(estimator):
    with pytest.raises(ValueError, match="groups of 4 answers, got 6 scores"):
        estimator(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="num_answers"):
        estimator(torch.zeros(6), 1)
    with pytest.raises(ValueError, match="scores must have 1 dimension"):
        estimator(torch.zeros(6, 1), 2)


# ---- explained variance


def test_explained_variance_of_perfect_constant_and_inverted_predictions():
    returns, mask = torch.randn(3, 7), torch.rand(3, 7) > 0.2
    assert explained_variance(returns, returns, mask).item() == 1
    assert_close(explained_variance(torch.full_like(returns, 4.0), returns, mask).item(), 0.0, rtol=0, atol=1e-6)
    assert_close(explained_variance(-returns, returns, mask).item(), -3.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_explained_variance_of_returns_that_do_not_vary_is_zero(level):
    assert explained_variance(torch.randn(3, 33), torch.full((3, 33), level), everything(3, 33)).item() == 0


# ---- KL control


def test_the_adaptive_coefficient_follows_the_published_controller():
    """KL of 12, 12, 5, 1 nats per sequence against a target of 6: errors of .2, .2, -.1667, -.2."""
    controller = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000)
    history = []
    for kl in (12.0, 12.0, 5.0, 1.0):
        controller.update(kl, num_episodes=512)
        history.append(controller.coef)
    assert history == pytest.approx([0.202048, 0.20411697, 0.20237517, 0.20030285], abs=5e-9)


def test_on_target_the_coefficient_stays():
    controller = AdaptiveKL(coef=0.1, target=6.0)
    controller.update(6.0, num_episodes=512)
    assert controller.coef == 0.1


def test_the_fixed_coefficient_stays_and_its_state_is_a_float():
    controller = FixedKL(0.05)
    controller.update(torch.tensor(100.0).item(), num_episodes=512)
    assert controller.coef == 0.05 and type(controller.coef) is float


def test_the_controllers_state_is_a_plain_float_even_from_a_tensor():
    controller = AdaptiveKL()
    controller.update(torch.tensor(12.0), num_episodes=10)
    assert type(controller.coef) is float


@pytest.mark.parametrize("arguments", [{"coef": -0.1}, {"target": 0.0}, {"horizon": 0.0}, {"coef": math.nan}])
def test_a_controllers_coefficients_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AdaptiveKL(**arguments)


def test_a_rollout_too_large_for_the_horizon_is_refused():
    with pytest.raises(ValueError, match="horizon must exceed 200"):
        AdaptiveKL(horizon=100.0).update(1.0, num_episodes=1000)


# ---- refusals


def test_shapes_that_do_not_fit_are_refused():
    table, mask = torch.zeros(4, 3), everything(4, 3)
    with pytest.raises(ValueError, match=r"values.*expected \(4, 3\), got \(4, 1\)"):
        gae(table, table[:, :1], mask)
    with pytest.raises(ValueError, match=r"expected \(4,\), got \(4, 1\)"):
        shaped_rewards(torch.zeros(4, 1), table, table, mask, 0.1)
    with pytest.raises(ValueError, match=r"expected \(4,\), got \(3,\)"):
        broadcast_to_tokens(torch.zeros(3), mask)
    with pytest.raises(ValueError, match="response_mask must be a bool mask"):
        gae(table, table, mask.long())
    with pytest.raises(ValueError, match="response_mask must have 2 dimension"):
        gae(table[0], table[0], mask[0])


@pytest.mark.parametrize("arguments", [{"gamma": 1.1}, {"gamma": -0.1}, {"lam": 1.01}, {"lam": math.nan}])
def test_discounts_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), everything(1, 2), **arguments)


def test_a_negative_kl_coefficient_is_refused():
    with pytest.raises(ValueError, match="kl_coef"):
        rewards_of(1.0, True, kl_coef=-0.1)
