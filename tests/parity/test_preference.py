"""Every preference loss against an independent reference, and its gradient against finite differences."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import (
    AOT,
    IPO,
    ORPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    EXOPair,
    Hinge,
    NCAPair,
    PreferenceLogps,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
    SPPOHard,
    pairwise_reward_loss,
)
from tests.losses.preference.examples import LOSS_CLASSES, random_pairs
from tests.parity import oracles

ORACLES = [
    (Sigmoid(), oracles.dpo),
    (Sigmoid(beta=0.5, label_smoothing=0.2), oracles.dpo),
    (SigmoidNorm(beta=5.0), oracles.dpo_length_normalised),
    (Hinge(beta=0.3), oracles.hinge),
    (IPO(), oracles.ipo),
    (IPO(beta=0.7, length_normalised=False), oracles.ipo),
    (Robust(beta=0.2, label_smoothing=0.1), oracles.robust),
    (EXOPair(), oracles.exo_pair),
    (EXOPair(beta=0.4, smoothing=0.2), oracles.exo_pair),
    (DiscoPOP(), oracles.discopop),
    (DiscoPOP(beta=0.05, tau=0.5), oracles.discopop),
    (NCAPair(beta=0.2), oracles.nca_pair),
    (BCOPair(beta=0.2), oracles.bco_pair),
    (SPPOHard(), oracles.sppo_hard),
    (APOZero(beta=0.3), oracles.apo_zero),
    (APODown(beta=0.3), oracles.apo_down),
    (AOT(), oracles.aot),
    (AOT(label_smoothing=0.1), oracles.aot),
    (AOTUnpaired(beta=0.3, label_smoothing=0.1), oracles.aot_unpaired),
    (ORPO(beta=0.3), oracles.orpo),
    (SimPO(beta=2.0), oracles.simpo),
    (SimPO(beta=2.5, gamma_beta_ratio=0.6), oracles.simpo),
]
every_loss = pytest.mark.parametrize(("loss", "oracle"), ORACLES, ids=lambda x: repr(x) if not callable(x) else "")


def by_hand(loss, oracle, pairs: PreferenceLogps) -> torch.Tensor:
    return torch.tensor(oracle(*(t.tolist() for t in pairs), **asdict(loss)), dtype=torch.float64)


def test_every_loss_has_an_oracle():
    assert {type(loss) for loss, _ in ORACLES} == set(LOSS_CLASSES)


@every_loss
@pytest.mark.parametrize("seed", range(5))
def test_float64_equals_the_oracle(loss, oracle, seed):
    pairs = random_pairs(num_pairs=7, seed=seed)
    assert_close(loss(pairs), by_hand(loss, oracle, pairs), rtol=1e-10, atol=1e-10)


@every_loss
def test_float32_equals_the_oracle(loss, oracle):
    pairs = random_pairs(num_pairs=50, seed=11, dtype=torch.float32)
    assert_close(loss(pairs).double(), by_hand(loss, oracle, pairs), rtol=2e-6, atol=1e-6)


@every_loss
def test_gradient_is_that_of_the_formula(loss, oracle):
    pairs = random_pairs(num_pairs=4, seed=3)
    logps = tuple(t.requires_grad_() for t in pairs[:4])
    assert torch.autograd.gradcheck(lambda *four: loss(PreferenceLogps(*four, *pairs[4:])), logps)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center_coef", [0.0, 0.01])
def test_the_reward_loss_equals_the_oracle(margin, center_coef):
    chosen, rejected, margins = torch.randn(3, 20, dtype=torch.float64)
    margins = margins if margin else None
    expected = oracles.pairwise_reward(
        chosen.tolist(), rejected.tolist(), margins.tolist() if margin else None, center_coef
    )
    loss = pairwise_reward_loss(chosen, rejected, margins, center_coef)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_the_reward_losss_gradient_is_that_of_the_formula():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64).unbind()
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, r: pairwise_reward_loss(c, r, center_coef=0.1), inputs)
