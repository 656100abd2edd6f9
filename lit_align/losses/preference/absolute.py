"""Losses that push each response's own implicit reward, not only the difference of the two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.losses.preference.base import PreferenceLogps, PreferenceLoss


@dataclass(frozen=True)
class NCAPair(PreferenceLoss):
    """Noise contrastive alignment on pairs: keeps the chosen response's own likelihood up.

    loss = -log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l), r = beta lr              arXiv:2402.05369
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """-log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l)."""
        chosen, rejected = self.beta * pairs.chosen_log_ratios, self.beta * pairs.rejected_log_ratios
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class BCOPair(PreferenceLoss):
    """Binary classifier optimisation on pairs: chosen is class 1, rejected is class 0.

    loss = -log s(r_w) - log s(-r_l), r = beta lr                                    arXiv:2404.04656

    Differs from the paper: its reward shift delta (a running mean of rewards) is 0 here, so that a pair's loss
    depends on nothing but the pair.
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """-log s(r_w) - log s(-r_l)."""
        chosen, rejected = self.beta * pairs.chosen_log_ratios, self.beta * pairs.rejected_log_ratios
        return -logsigmoid(chosen) - logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPOHard(PreferenceLoss):
    """Self-play preference optimisation with hard labels: the winner's win rate is 1, the loser's 0.

    loss = (lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2                         arXiv:2405.00675

    beta is 1 / eta of the paper (which trains with eta = 1000).
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """(lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2."""
        target = 1 / (2 * self.beta)
        return (pairs.chosen_log_ratios - target).square() + (pairs.rejected_log_ratios + target).square()


@dataclass(frozen=True)
class APOZero(PreferenceLoss):
    """Anchored preference optimisation, "zero": chosen up, rejected down, each against the reference.

    loss = -s(r_w) + s(r_l) + 1, r = beta lr                                         Eq. 7, arXiv:2408.06266
    For data whose chosen responses are better than the model's own. The paper has no constant 1, which has no
    gradient; with it the loss is never negative.
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """1 - s(r_w) + s(r_l)."""
        chosen, rejected = self.beta * pairs.chosen_log_ratios, self.beta * pairs.rejected_log_ratios
        return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(PreferenceLoss):
    """Anchored preference optimisation, "down": both down, rejected further.

    loss = s(r_w) - s(r_w - r_l) + 1, r = beta lr                                    Eq. 8, arXiv:2408.06266
    For data whose chosen responses are worse than the model's own. The constant 1 is as in `APOZero`.
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """s(r_w) + 1 - s(r_w - r_l)."""
        chosen, rejected = self.beta * pairs.chosen_log_ratios, self.beta * pairs.rejected_log_ratios
        return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)
