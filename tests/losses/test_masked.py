"""Masked sums, means and whitening."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import masked_mean, masked_sum, masked_whiten

VALUES = torch.tensor([[1.0, 2.0, 999.0], [999.0, 3.0, 4.0]])
MASK = torch.tensor([[True, True, False], [False, True, True]])
GARBAGE = [999.0, -1e30, math.inf, math.nan]


def with_garbage(garbage: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.where(MASK, VALUES.to(dtype), garbage)


def test_sums_and_means_by_hand():
    assert masked_sum(VALUES, MASK).item() == 10
    assert masked_mean(VALUES, MASK).item() == 2.5
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3, 7]
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 3.5]
    assert masked_mean(VALUES, MASK, dim=(0, 1)).item() == 2.5


def test_whitening_uses_the_biased_variance():
    """1 2 3 4: mean 2.5, variance 1.25 -> +-1.3416, +-.4472 (the unbiased one would give +-1.1619, +-.3873)."""
    whitened = masked_whiten(VALUES, MASK)
    assert_close(whitened[MASK], torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416]), rtol=0, atol=5e-5)
    assert (whitened[~MASK] == 0).all()


def test_whitened_values_have_mean_0_and_variance_1():
    values, mask = torch.randn(20, 30) * 7 + 100, torch.rand(20, 30) > 0.3
    inside = masked_whiten(values, mask)[mask]
    assert_close(inside.mean().item(), 0.0, rtol=0, atol=1e-6)
    assert_close(inside.var(correction=0).item(), 1.0, rtol=0, atol=1e-5)


def test_without_shifting_the_mean_stays():
    kept = masked_whiten(VALUES, MASK, shift_mean=False)
    assert_close(kept[MASK], masked_whiten(VALUES, MASK)[MASK] + 2.5)
    assert (kept[~MASK] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten])
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(function, garbage):
    results = []
    for values in (with_garbage(0.0), with_garbage(garbage)):
        values.requires_grad_()
        out = function(values, MASK)
        (out * torch.linspace(1, 2, 6).view(2, 3) if out.ndim else out).sum().backward()
        results.append((out.detach(), values.grad))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[1][1][~MASK] == 0).all()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten])
def test_an_empty_mask_gives_zero_with_a_backward(function):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    out = function(values, torch.zeros(2, 3, dtype=torch.bool)).sum()
    out.backward()
    assert out.item() == 0 and (values.grad == 0).all()


@pytest.mark.parametrize("level", [0.0, 0.1, -3.7, 1e4, 123456.7])
def test_values_without_spread_whiten_to_zeros(level):
    values = torch.full((64, 33), level)
    assert masked_whiten(values, torch.ones_like(values, dtype=torch.bool)).abs().max() < 1e-3


def test_a_single_value_whitens_to_zero():
    assert masked_whiten(torch.tensor([5.0, 7.0]), torch.tensor([True, False])).tolist() == [0, 0]


def test_half_precision_is_summed_in_float32():
    values = torch.ones(4096, dtype=torch.bfloat16)
    total = masked_sum(values, torch.ones(4096, dtype=torch.bool))
    assert total.dtype == torch.float32 and total.item() == 4096


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten])
def test_wrong_shapes_and_masks_of_numbers_are_refused(function):
    with pytest.raises(ValueError, match=r"expected \(4, 1\), got \(4,\)"):
        function(torch.zeros(4, 1), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool mask, got torch.int64"):
        function(torch.zeros(4), torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten])
def test_gradients_are_those_of_the_formula(function):
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, MASK), values)
