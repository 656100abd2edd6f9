"""Losses on preference pairs: DPO and its family, reference-free losses, the reward model's loss."""

from lit_align.losses.preference.absolute import APODown, APOZero, BCOPair, NCAPair, SPPOHard
from lit_align.losses.preference.base import PreferenceLogps, PreferenceLoss
from lit_align.losses.preference.pairs import chosen_nll, pairwise_reward_loss
from lit_align.losses.preference.reference_free import ORPO, SimPO
from lit_align.losses.preference.relative import IPO, DiscoPOP, EXOPair, Hinge, Robust, Sigmoid, SigmoidNorm
from lit_align.losses.preference.transport import AOT, AOTUnpaired

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
    "NCAPair",
    "PreferenceLogps",
    "PreferenceLoss",
    "Robust",
    "SPPOHard",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "chosen_nll",
    "pairwise_reward_loss",
]
