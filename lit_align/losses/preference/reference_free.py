"""Preference losses that need no reference model: they compare average log-probabilities per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.losses.checks import check_range
from lit_align.losses.preference.base import PreferenceLogps, PreferenceLoss, per_token


@dataclass(frozen=True)
class ReferenceFreeLoss(PreferenceLoss):
    """A preference loss whose implicit reward is the average log-probability, times beta."""

    reference_free: ClassVar[bool] = True

    def rewards(self, pairs: PreferenceLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards beta * log pi(y|x) / |y| of chosen and rejected responses, each [B], detached."""
        chosen, rejected = average_logps(pairs)
        return (self.beta * chosen).detach(), (self.beta * rejected).detach()


def average_logps(pairs: PreferenceLogps) -> tuple[Tensor, Tensor]:
    """Average log-probabilities log pi(y|x) / |y| of chosen and rejected responses, each [B]."""
    chosen = per_token(pairs.policy_chosen, pairs.chosen_lengths)
    return chosen, per_token(pairs.policy_rejected, pairs.rejected_lengths)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0; at log p = 0 the odds are infinite, so log p is held just below."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


@dataclass(frozen=True)
class ORPO(ReferenceFreeLoss):
    """Odds-ratio preference optimisation: likelihood of chosen plus a penalty on the odds of rejected.

    loss = -log p_w - beta log s(log odds(p_w) - log odds(p_l)), log p = log pi(y|x) / |y|, odds(p) = p / (1 - p)
    Eq. 6 and 7, arXiv:2403.07691

    beta is the paper's lambda. The first term is the mean over pairs of each response's mean NLL per token.
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """NLL of chosen - beta log s(log odds ratio)."""
        chosen, rejected = average_logps(pairs)
        return -chosen - self.beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


@dataclass(frozen=True)
class SimPO(ReferenceFreeLoss):
    """Simple preference optimisation: average log-probability as reward, with a target margin.

    loss = -log s(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma)   Eq. 6, arXiv:2405.14734

    The log-probabilities are averages, so beta has to be larger than DPO's: the paper trains with 2 and more.

    Attributes:
        gamma_beta_ratio: The target margin as gamma / beta, in nats per token, >= 0; gamma itself would have to be
            changed with every change of beta.
    """

    gamma_beta_ratio: float = 0.25

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("gamma_beta_ratio", self.gamma_beta_ratio, 0, with_low=True)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """-log s(beta (average log-probability of chosen - of rejected) - gamma)."""
        chosen, rejected = average_logps(pairs)
        return -logsigmoid(self.beta * (chosen - rejected - self.gamma_beta_ratio))
