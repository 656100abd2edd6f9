"""Losses as pure functions: tensors in, tensors out; no module, config, logging or device.

Notation
    B       preference pairs (or rows of a batch)
    S       sequences (responses) of a rollout
    N       scored tokens: the tokens whose log-probability a loss needs, sequence after sequence
    T       tokens of prompt and response
    R       response tokens, padded
    V       vocabulary
    pi      the policy that is trained;  pi_ref  the frozen reference;  pi_old  the policy that sampled the rollout
    y_w, y_l  the chosen (winning) and the rejected (losing) response

Names
    token_logps   natural log-probability of single tokens, [N] or [S, R], nats
    logps         the same summed over a response's tokens, [S] or [B], nats
    *_mask        bool, True = the entry counts
    *_coef        a coefficient;  clip_range  a threshold;  num_*  a count

Denominators
    Losses come unreduced, or as sums. The caller divides by the total of the whole optimizer step (all micro-batches,
    all ranks); only then is the update independent of how the step is split. The exception is
    `shifted_cross_entropy` without a normaliser, which says so.
"""

from lit_align.losses.language import shifted_cross_entropy, weighted_nll
from lit_align.losses.masked import masked_mean, masked_sum, masked_whiten
from lit_align.losses.policy import (
    KLKind,
    PolicyLoss,
    ValueLoss,
    clipped_policy_loss,
    clipped_value_loss,
    kl_estimates,
)
from lit_align.losses.preference import (
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
    chosen_nll,
    pairwise_reward_loss,
)

__all__ = [
    "AOT",
    "IPO",
    "ORPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "BCOPair",
    "DiscoPOP",
    "EXOPair",
    "Hinge",
    "KLKind",
    "NCAPair",
    "PolicyLoss",
    "PreferenceLogps",
    "PreferenceLoss",
    "Robust",
    "SPPOHard",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "ValueLoss",
    "chosen_nll",
    "clipped_policy_loss",
    "clipped_value_loss",
    "kl_estimates",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "pairwise_reward_loss",
    "shifted_cross_entropy",
    "weighted_nll",
]
