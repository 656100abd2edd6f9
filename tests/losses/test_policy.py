"""PPO's clipped losses and the KL estimators, against tables computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import clipped_policy_loss, clipped_value_loss, kl_estimates


def policy_loss(advantage: float, ratio: float, **options: float):
    return clipped_policy_loss(torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), **options)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [
        (1.0, 1.5, -1.2, True),
        (1.0, 1.1, -1.1, False),
        (1.0, 0.5, -0.5, False),
        (-1.0, 1.5, 1.5, False),
        (-1.0, 0.9, 0.9, False),
        (-1.0, 0.5, 0.8, True),
        (-1.0, 5.0, 5.0, False),
    ],
)
def test_clipped_objective(advantage, ratio, loss, clipped):
    """-A rho, held at 1.2 from above for A > 0 and at .8 from below for A < 0."""
    out = policy_loss(advantage, ratio)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-6)
    assert_close(out.ratio.item(), ratio, rtol=1e-6, atol=0)
    assert out.clipped.item() is clipped


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [(-1.0, 5.0, 3.0, True), (-1.0, 2.9, 2.9, False), (-2.0, 5.0, 6.0, True), (1.0, 5.0, -1.2, True)],
)
def test_dual_clip_bounds_only_negative_advantages(advantage, ratio, loss, clipped):
    out = policy_loss(advantage, ratio, dual_clip=3.0)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-6)
    assert out.clipped.item() is clipped


def test_the_upper_range_may_differ_from_the_lower_one():
    assert_close(policy_loss(1.0, 1.5, clip_range_high=0.28).loss.item(), -1.28, rtol=0, atol=1e-6)
    assert_close(policy_loss(-1.0, 0.5, clip_range_high=0.28).loss.item(), 0.8, rtol=0, atol=1e-6)


def test_clipped_tokens_and_only_they_have_no_gradient():
    token_logps = torch.randn(200, requires_grad=True)
    out = clipped_policy_loss(token_logps, torch.zeros(200), torch.randn(200), dual_clip=2.0)
    (gradient,) = torch.autograd.grad(out.loss.sum(), token_logps)
    assert torch.equal(gradient == 0, out.clipped)
    assert 0 < out.clipped.sum() < 200 and not out.ratio.requires_grad


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    token_logps = torch.randn(9, requires_grad=True)
    advantages = torch.randn(9)
    out = clipped_policy_loss(token_logps, token_logps.detach(), advantages)
    (gradient,) = torch.autograd.grad(out.loss.sum(), token_logps)
    assert (out.ratio == 1).all() and not out.clipped.any()
    assert_close(gradient, -advantages, rtol=0, atol=0)
    assert_close(out.loss.detach(), -advantages, rtol=0, atol=0)


def test_absurd_log_ratios_stay_finite():
    out = clipped_policy_loss(torch.tensor([500.0, -500.0]), torch.zeros(2), torch.tensor([-1.0, 1.0]))
    assert out.loss.isfinite().all() and out.ratio.isfinite().all()


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (0.9, 0.5, 1.0, 0.045, True),  # held at .7: .3^2 / 2
        (0.6, 0.5, 1.0, 0.08, False),  # within the range: .4^2 / 2
        (0.9, 0.5, 0.0, 0.405, False),  # the free error is the larger one: .9^2 / 2
        (0.1, 0.5, 0.0, 0.045, True),  # held at .3
    ],
)
def test_clipped_value(value, old, target, loss, clipped):
    out = clipped_value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]))
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-6)
    assert out.clipped.item() is clipped


def test_without_a_range_the_value_loss_is_half_the_squared_error():
    values, returns = torch.randn(5), torch.randn(5)
    out = clipped_value_loss(values, torch.randn(5), returns, clip_range=None)
    assert_close(out.loss, 0.5 * (values - returns).square())
    assert not out.clipped.any()


def test_kl_estimators():
    token_logps, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    expected = {"k1": [0.5, -1.0, 0.0], "k2": [0.125, 0.5, 0.0], "k3": [0.106531, 0.718282, 0.0]}
    for kind, values in expected.items():
        assert_close(kl_estimates(token_logps, reference, kind), torch.tensor(values), rtol=0, atol=1e-6)


def test_k3_is_finite_and_not_negative_everywhere():
    log_ratios = torch.linspace(-1000, 1000, 2001)
    k3 = kl_estimates(log_ratios, torch.zeros_like(log_ratios), "k3")
    assert k3.isfinite().all() and (k3 >= 0).all()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    """Their expectation over the policy's tokens is the divergence itself, by enumeration."""
    policy, reference = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    expectation = (policy.exp() * kl_estimates(policy, reference, kind)).sum()
    assert_close(expectation, (policy.exp() * (policy - reference)).sum())


def test_empty_inputs_have_a_backward():
    empty = torch.zeros(0, requires_grad=True)
    constant = torch.zeros(0)
    loss = clipped_policy_loss(empty, constant, constant, dual_clip=3.0).loss.sum()
    (loss + clipped_value_loss(empty, constant, constant).loss.sum()).backward()
    assert empty.grad.shape == (0,)


def test_gradients_are_those_of_the_formulas():
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    a, b = torch.randn(2, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, a, b, dual_clip=3.0).loss, x)
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, a, b).loss, x)
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: kl_estimates(x, a, kind), x)


def test_columns_are_refused_instead_of_broadcast():
    row, column = torch.zeros(4), torch.zeros(4, 1)
    for call in (
        lambda: clipped_policy_loss(row, row, column),
        lambda: clipped_policy_loss(row, column, row),
        lambda: clipped_value_loss(row, column, row),
        lambda: clipped_value_loss(row, row, column),
        lambda: kl_estimates(row, column),
    ):
        with pytest.raises(ValueError, match=r"expected \(4,\), got \(4, 1\)"):
            call()


def test_constants_that_carry_a_gradient_are_refused():
    row, live = torch.zeros(4), torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match="old_token_logps is a constant"):
        clipped_policy_loss(live, live, row)
    with pytest.raises(ValueError, match="returns is a constant"):
        clipped_value_loss(live, row, live)


@pytest.mark.parametrize(
    "options", [{"clip_range": 0.0}, {"clip_range": 1.5}, {"clip_range_high": -0.1}, {"dual_clip": 1.0}]
)
def test_coefficients_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        policy_loss(1.0, 1.0, **options)


def test_value_range_and_unknown_estimator_are_refused():
    with pytest.raises(ValueError, match="clip_range"):
        clipped_value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip_range=0.0)
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimates(torch.zeros(1), torch.zeros(1), "k4")


def test_a_value_that_has_not_moved_is_not_counted_as_clipped():
    g = torch.Generator().manual_seed(0)
    old = torch.rand(2000, generator=g) * 3
    values = old + (torch.rand(2000, generator=g) - 0.5) * 1e-6
    loss = clipped_value_loss(values, old, torch.rand(2000, generator=g), 0.2)
    assert not loss.clipped.any()
