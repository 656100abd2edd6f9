"""What each KL estimator does to the policy, by where it is put: gradients by enumeration, nothing is sampled.

A policy over six tokens, its logits the parameters. "In the loss" means: the gradient of the estimate of a sampled
token, averaged over the policy's own tokens (their probabilities held constant, as sampling does). "In the reward":
the estimate is a constant and weighs the gradient of the token's log-probability.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.losses import KLKind, kl_estimates

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def reference() -> Tensor:
    return torch.randn(6, dtype=torch.float64).log_softmax(-1)


def in_loss(logits: Tensor, reference: Tensor, kind: KLKind) -> Tensor:
    logps = logits.log_softmax(-1)
    sampled = logps.detach().exp()
    return torch.autograd.grad((sampled * kl_estimates(logps, reference, kind)).sum(), logits)[0]


def in_reward(logits: Tensor, reference: Tensor, kind: KLKind) -> Tensor:
    logps = logits.log_softmax(-1)
    cost = kl_estimates(logps.detach(), reference, kind)
    return torch.autograd.grad((logps.detach().exp() * cost * logps).sum(), logits)[0]


def true_gradients(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of KL(pi || pi_ref) and of KL(pi_ref || pi)."""
    logps = logits.log_softmax(-1)
    forward = (logps.exp() * (logps - reference)).sum()
    reverse = (reference.exp() * (reference - logps)).sum()
    return torch.autograd.grad(forward, logits, retain_graph=True)[0], torch.autograd.grad(reverse, logits)[0]


def test_k1_in_the_reward_is_the_gradient_of_the_divergence(logits, reference):
    wanted, _ = true_gradients(logits, reference)
    assert_close(in_reward(logits, reference, "k1"), wanted, **EXACT)


def test_k2_in_the_loss_is_the_gradient_of_the_divergence(logits, reference):
    wanted, _ = true_gradients(logits, reference)
    assert_close(in_loss(logits, reference, "k2"), wanted, **EXACT)


def test_k3_in_the_loss_is_the_gradient_of_the_reverse_divergence(logits, reference):
    wanted, reverse = true_gradients(logits, reference)
    gradient = in_loss(logits, reference, "k3")
    assert_close(gradient, reverse, **EXACT)
    assert (gradient - wanted).norm() > 0.1


def test_k1_in_the_loss_does_nothing(logits, reference):
    assert_close(in_loss(logits, reference, "k1"), torch.zeros_like(logits), **EXACT)


def test_k3_in_the_reward_is_biased_by_the_reverse_divergence(logits, reference):
    wanted, reverse = true_gradients(logits, reference)
    assert_close(in_reward(logits, reference, "k3"), wanted - reverse, **EXACT)
