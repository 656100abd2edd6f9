"""Preference pairs and losses that several test files use."""

from __future__ import annotations

import torch

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
    PreferenceLoss,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
    SPPOHard,
)

LOSS_CLASSES: list[type[PreferenceLoss]] = [
    AOT,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    EXOPair,
    Hinge,
    IPO,
    NCAPair,
    ORPO,
    Robust,
    SPPOHard,
    Sigmoid,
    SigmoidNorm,
    SimPO,
]


def random_pairs(num_pairs: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreferenceLogps:
    """Pairs with responses of 1 to 9 tokens and log-probabilities of -0.1 to -3 nats per token."""
    generator = torch.Generator().manual_seed(seed)

    def lengths() -> torch.Tensor:
        return torch.randint(1, 10, (num_pairs,), generator=generator).to(dtype)

    def logps(tokens: torch.Tensor) -> torch.Tensor:
        return -tokens * (0.1 + 2.9 * torch.rand(num_pairs, generator=generator, dtype=torch.float64)).to(dtype)

    chosen, rejected = lengths(), lengths()
    return PreferenceLogps(logps(chosen), logps(rejected), logps(chosen), logps(rejected), chosen, rejected)


def pairs_at_reference(num_pairs: int = 4) -> PreferenceLogps:
    """Pairs whose policy is the reference: step 0 of a run."""
    pairs = random_pairs(num_pairs)
    return pairs._replace(reference_chosen=pairs.policy_chosen, reference_rejected=pairs.policy_rejected)


def trainable(pairs: PreferenceLogps) -> PreferenceLogps:
    """The same pairs with policy log-probabilities that take a gradient."""
    return pairs._replace(
        policy_chosen=pairs.policy_chosen.clone().requires_grad_(),
        policy_rejected=pairs.policy_rejected.clone().requires_grad_(),
    )
