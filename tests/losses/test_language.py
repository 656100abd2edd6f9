"""Shifted cross-entropy: what predicts what, and what it is divided by."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import shifted_cross_entropy, weighted_nll


def ragged_batch(rows: int = 4, tokens: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels in which each row has another number of trained tokens."""
    logits = torch.randn(rows, tokens, vocabulary, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows, tokens))
    for row in range(rows):
        labels[row, : 1 + row] = -100
    return logits, labels


def test_uniform_logits_cost_ln_vocabulary():
    loss = shifted_cross_entropy(torch.zeros(2, 5, 16), torch.randint(16, (2, 5)))
    assert_close(loss.item(), math.log(16), rtol=0, atol=1e-6)


def test_logits_predict_the_next_label():
    """Logits that know the next token cost nothing; logits that know their own token cost all."""
    labels = torch.tensor([[3, 1, 2, 0, 2]])
    knowing_next = 100.0 * torch.nn.functional.one_hot(labels.roll(-1, dims=1), 4).float()
    knowing_own = 100.0 * torch.nn.functional.one_hot(labels, 4).float()
    assert shifted_cross_entropy(knowing_next, labels).item() == 0
    assert shifted_cross_entropy(knowing_own, labels).item() == 100


def test_the_first_label_and_the_last_logits_have_no_part():
    logits, labels = ragged_batch()
    labels = labels.clamp(min=0)
    logits.requires_grad_()
    loss = shifted_cross_entropy(logits, labels)
    for first in (0, -100):
        changed = labels.clone()
        changed[:, 0] = first
        assert_close(shifted_cross_entropy(logits, changed), loss, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, -1] == 0).all() and (gradient[:, :-1] != 0).any(dim=-1).all()


def test_positions_before_ignored_labels_get_no_gradient():
    logits, labels = ragged_batch()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(shifted_cross_entropy(logits, labels), logits)
    trained = labels[:, 1:] != -100
    assert ((gradient[:, :-1] != 0).any(dim=-1) == trained).all()


def test_the_default_denominator_is_the_trained_tokens_of_the_call():
    logits, labels = ragged_batch()
    trained = int((labels[:, 1:] != -100).sum())
    total = shifted_cross_entropy(logits, labels, normaliser=1.0)
    assert_close(shifted_cross_entropy(logits, labels), total / trained)
    assert_close(shifted_cross_entropy(logits, labels, normaliser=torch.tensor(trained)), total / trained)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_with_the_steps_denominator_add_up_and_means_of_means_do_not(rows):
    logits, labels = ragged_batch()
    whole = shifted_cross_entropy(logits, labels)
    trained = float((labels[:, 1:] != -100).sum())
    parts = list(zip(logits.split(rows), labels.split(rows), strict=True))
    exact = sum(shifted_cross_entropy(*part, normaliser=trained) for part in parts)
    mean_of_means = sum(shifted_cross_entropy(*part) for part in parts) / len(parts)
    assert_close(exact, whole, rtol=1e-12, atol=0)
    assert abs(mean_of_means - whole) > 1e-3


def test_no_trained_token_gives_zero_with_a_gradient_of_zeros():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = shifted_cross_entropy(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_half_precision_logits_are_widened_first():
    logits, labels = ragged_batch()
    half = logits.to(torch.bfloat16)
    loss = shifted_cross_entropy(half, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, shifted_cross_entropy(half.float(), labels), rtol=0, atol=0)


def test_another_ignore_index_is_obeyed():
    logits, labels = ragged_batch()
    other = torch.where(labels == -100, -1, labels)
    assert_close(shifted_cross_entropy(logits, other, ignore_index=-1), shifted_cross_entropy(logits, labels))


def test_gradient_is_that_of_the_formula():
    logits, labels = ragged_batch(2, 4, 3)
    assert torch.autograd.gradcheck(lambda x: shifted_cross_entropy(x, labels), logits.requires_grad_())


def test_wrong_shapes_and_denominators_are_refused():
    logits, labels = ragged_batch()
    with pytest.raises(ValueError, match=r"expected \(4, 7\), got \(4, 6\)"):
        shifted_cross_entropy(logits, labels[:, :-1])
    with pytest.raises(ValueError, match="logits must have 3 dimension"):
        shifted_cross_entropy(logits[0], labels)
    with pytest.raises(ValueError, match="normaliser"):
        shifted_cross_entropy(logits, labels, normaliser=0)


def test_weighted_nll_by_hand():
    """-(1 * -2 + 0.5 * -3) = 3.5."""
    assert weighted_nll(torch.tensor([-2.0, -3.0]), torch.tensor([1.0, 0.5])).item() == 3.5


def test_weighted_nll_over_the_trained_tokens_is_shifted_cross_entropy():
    logits, labels = ragged_batch()
    log_probs = logits[:, :-1].log_softmax(-1)
    trained = labels[:, 1:] != -100
    token_logps = log_probs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][trained]
    nll = weighted_nll(token_logps, torch.ones_like(token_logps)) / trained.sum()
    assert_close(nll, shifted_cross_entropy(logits, labels))


def test_weighted_nll_of_no_tokens_is_zero_with_a_backward():
    token_logps = torch.zeros(0, requires_grad=True)
    nll = weighted_nll(token_logps, torch.zeros(0))
    nll.backward()
    assert nll.item() == 0 and token_logps.grad.shape == (0,)


def test_weighted_nll_refuses_columns():
    with pytest.raises(ValueError, match=r"weights.*expected \(3,\), got \(3, 1\)"):
        weighted_nll(torch.zeros(3), torch.ones(3, 1))
