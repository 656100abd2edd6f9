"""Preference losses against the numbers that TRL computes from the same log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lit_align.losses import (
    AOT,
    IPO,
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
    SPPOHard,
    weighted_nll,
)

GOLDEN = json.loads((Path(__file__).parent / "preference.json").read_text())

LOSSES = {
    "sigmoid|beta0.1": Sigmoid(beta=0.1),
    "sigmoid|beta0.5": Sigmoid(beta=0.5),
    "hinge|beta0.1": Hinge(beta=0.1),
    "hinge|beta0.5": Hinge(beta=0.5),
    "ipo|beta0.1": IPO(beta=0.1),
    "ipo|beta0.5": IPO(beta=0.5),
    "exo_pair|beta0.1|ls1e-3": EXOPair(beta=0.1, smoothing=1e-3),
    "nca_pair|beta0.1": NCAPair(beta=0.1),
    "robust|beta0.1": Robust(beta=0.1),
    "robust|beta0.1|ls0.1": Robust(beta=0.1, label_smoothing=0.1),
    "bco_pair|beta0.1": BCOPair(beta=0.1),
    "sppo_hard|beta0.1": SPPOHard(beta=0.1),
    "aot|beta0.1": AOT(beta=0.1),
    "aot|beta0.1|ls0.1": AOT(beta=0.1, label_smoothing=0.1),
    "aot_unpaired|beta0.1": AOTUnpaired(beta=0.1),
    "apo_zero|beta0.1": APOZero(beta=0.1),
    "apo_down|beta0.1": APODown(beta=0.1),
    "discopop|beta0.1": DiscoPOP(beta=0.1),
    "sigmoid_norm|beta0.1": SigmoidNorm(beta=0.1),
}

SFT = "sft|beta0.1"

OUT_OF_SCOPE = {
    "sigmoid|forward_kl|beta0.1": "f-divergences other than reverse KL are not offered",
    "sigmoid|js_divergence|beta0.1": "f-divergences other than reverse KL are not offered",
    "sigmoid|alpha_divergence|beta0.1": "f-divergences other than reverse KL are not offered",
    "sigmoid|wpo": "WPO's weights need the whole distribution of each token, not its log-probability",
    "sigmoid|ld_alpha0.0|ref_not_reweighted": "LD-DPO re-weights tokens by position, before the sums made here",
    "sigmoid|ld_alpha0.5|ref_not_reweighted": "LD-DPO re-weights tokens by position, before the sums made here",
    "sigmoid|ld_alpha1.0|ref_not_reweighted": "LD-DPO re-weights tokens by position, before the sums made here",
}


def token_logps_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [4, 5] of tokens 1.. and the mask of response tokens among them; two chosen, two rejected."""
    inputs = GOLDEN["inputs"]
    return torch.tensor(inputs["per_token_logps"]), torch.tensor(inputs["completion_mask"])[:, 1:].bool()


def recorded_pairs() -> PreferenceLogps:
    token_logps, mask = token_logps_and_mask()
    logps, lengths = (token_logps * mask).sum(-1), mask.sum(-1).float()
    references = [torch.tensor(GOLDEN["inputs"][f"ref_{side}_logps"]) for side in ("chosen", "rejected")]
    return PreferenceLogps(*logps.split(2), *references, *lengths.split(2))


def test_the_recorded_pairs_are_the_documented_ones():
    pairs = recorded_pairs()
    assert_close(pairs.policy_chosen, torch.tensor([-1.7, -1.0]))
    assert_close(pairs.policy_rejected, torch.tensor([-2.0, -2.0]))
    assert (pairs.chosen_lengths.tolist(), pairs.rejected_lengths.tolist()) == ([3, 2], [2, 4])


@pytest.mark.parametrize("key", LOSSES)
def test_the_mean_loss_is_the_recorded_one(key):
    assert_close(LOSSES[key](recorded_pairs()).mean().item(), GOLDEN["cases"][key], rtol=1e-6, atol=1e-6)


def test_the_likelihood_term_over_all_chosen_tokens_is_the_recorded_one():
    token_logps, mask = token_logps_and_mask()
    chosen = token_logps[:2][mask[:2]]
    assert_close((weighted_nll(chosen, torch.ones(5)) / 5).item(), GOLDEN["cases"][SFT], rtol=1e-6, atol=1e-6)


def test_every_recorded_number_is_compared_or_left_out_for_a_reason():
    assert set(GOLDEN["cases"]) == {*LOSSES, SFT, *OUT_OF_SCOPE}
    assert len(LOSSES) + 1 + len(OUT_OF_SCOPE) == len(GOLDEN["cases"])
