"""Shifted cross-entropy against transformers' own loss and against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from lit_align.losses import shifted_cross_entropy
from tests.parity import oracles


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(3, 9, 13, dtype=dtype)
    labels = torch.randint(13, (3, 9))
    labels[0, :4] = -100
    labels[2, 6:] = -100
    return logits, labels


@pytest.mark.parametrize("normaliser", [None, 57], ids=["own count", "given count"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_those_of_transformers(normaliser, dtype):
    logits, labels = batch(dtype)
    logits.requires_grad_()
    ours = shifted_cross_entropy(logits, labels, normaliser)
    theirs = ForCausalLMLoss(logits, labels, vocab_size=13, num_items_in_batch=normaliser)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    (our_gradient,), (their_gradient,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-8)


def test_loss_equals_the_definition():
    logits, labels = batch(torch.float64)
    expected = oracles.shifted_cross_entropy(logits.tolist(), labels.tolist())
    assert_close(shifted_cross_entropy(logits, labels).item(), expected, rtol=1e-12, atol=0)
