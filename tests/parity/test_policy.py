"""PPO's losses and advantages against independent references on random inputs."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import clipped_policy_loss, clipped_value_loss, masked_whiten
from lit_align.rollout.advantages import gae, grpo_advantages, rloo_advantages, shaped_rewards
from tests.parity import oracles

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rollout(rows: int = 8, columns: int = 12) -> tuple[torch.Tensor, ...]:
    """Four float64 [S, R] tensors and a mask with gaps, left padding, right padding and an empty row."""
    mask = torch.rand(rows, columns) > 0.4
    mask[0], mask[1, :5], mask[2, 7:] = False, False, False
    return (*torch.randn(4, rows, columns, dtype=torch.float64), mask)


@pytest.mark.parametrize("dual", [None, 1.5])
def test_policy_loss(dual):
    logps, old, advantages = torch.randn(3, 300, dtype=torch.float64)
    loss = clipped_policy_loss(logps, old, advantages, 0.2, 0.3, dual).loss
    columns = zip(logps.tolist(), old.tolist(), advantages.tolist(), strict=True)
    expected = [oracles.clipped_policy(a, b, c, 0.2, 0.3, dual) for a, b, c in columns]
    assert_close(loss.tolist(), expected, **EXACT)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss(clip_range):
    values, old, returns = torch.randn(3, 300, dtype=torch.float64)
    loss = clipped_value_loss(values, old, returns, clip_range).loss
    columns = zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
    assert_close(loss.tolist(), [oracles.clipped_value(a, b, c, clip_range) for a, b, c in columns], **EXACT)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae(gamma, lam):
    rewards, values, _, _, mask = rollout()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        expected = oracles.gae(rewards[row].tolist(), values[row].tolist(), mask[row].tolist(), gamma, lam)
        assert_close((advantages[row].tolist(), returns[row].tolist()), expected, **EXACT)


def test_shaped_rewards():
    logps, reference, scores, _, mask = rollout()
    scores = scores[:, 0]
    rewards = shaped_rewards(scores, logps, reference, mask, 0.3)
    for row in range(len(mask)):
        columns = (logps[row].tolist(), reference[row].tolist(), mask[row].tolist())
        assert_close(rewards[row].tolist(), oracles.shaped_rewards(scores[row].item(), *columns, 0.3), **EXACT)


def test_whitening():
    values, *_, mask = rollout()
    expected = oracles.whiten(values.flatten().tolist(), mask.flatten().tolist())
    assert_close(masked_whiten(values, mask).flatten().tolist(), expected, **EXACT)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_critic_free_advantages(n):
    scores = torch.randn(12, dtype=torch.float64)
    assert_close(rloo_advantages(scores, n).tolist(), oracles.rloo(scores.tolist(), n), **EXACT)
    assert_close(grpo_advantages(scores, n, 1e-6).tolist(), oracles.grpo(scores.tolist(), n, 1e-6), **EXACT)
