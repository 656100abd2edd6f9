"""Losses of the difference between chosen and rejected log-ratios: DPO and its nearest relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lit_align.losses.checks import check_range
from lit_align.losses.preference.base import PreferenceLogps, PreferenceLoss, per_token


def margins(pairs: PreferenceLogps) -> Tensor:
    """lr_w - lr_l, [B]."""
    return pairs.chosen_log_ratios - pairs.rejected_log_ratios


def smoothed_logistic(scores: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of a preference that is flipped with probability e: -(1 - e) log s(x) - e log s(-x)."""
    if label_smoothing == 0:
        return -logsigmoid(scores)
    return -(1 - label_smoothing) * logsigmoid(scores) - label_smoothing * logsigmoid(-scores)


@dataclass(frozen=True)
class Sigmoid(PreferenceLoss):
    """DPO: a logistic regression on the difference of implicit rewards.

    loss = -log s(beta (lr_w - lr_l))                                                Eq. 7, arXiv:2305.18290
    With label_smoothing e: -(1 - e) log s(x) - e log s(-x), "conservative DPO"
    (E. Mitchell, "A note on DPO with noisy preferences", 2023, https://ericmitchell.ai/cdpo.pdf).

    Attributes:
        label_smoothing: Assumed probability e that a pair's labels are swapped, in [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, 0, 0.5, with_low=True)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """-log s(beta (lr_w - lr_l)), smoothed."""
        return smoothed_logistic(self.beta * margins(pairs), self.label_smoothing)


@dataclass(frozen=True)
class SigmoidNorm(PreferenceLoss):
    """DPO with length-normalised log-ratios.

    loss = -log s(beta (lr_w / |y_w| - lr_l / |y_l|))                                arXiv:2411.15124 (Tulu 3)

    The log-ratios are per token, so beta has to be larger than DPO's: the paper trains with 5.
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """-log s(beta (lr_w / |y_w| - lr_l / |y_l|))."""
        chosen = per_token(pairs.chosen_log_ratios, pairs.chosen_lengths)
        rejected = per_token(pairs.rejected_log_ratios, pairs.rejected_lengths)
        return -logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """Hinge loss on the difference of implicit rewards.

    loss = max(0, 1 - beta (lr_w - lr_l))                           arXiv:2309.06657 (RSO), after arXiv:2305.10425
    """

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """max(0, 1 - beta (lr_w - lr_l))."""
        return relu(1 - self.beta * margins(pairs))


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation: a target for the margin instead of "as large as possible".

    loss = (h - 1 / (2 beta))^2, h = lr_w / |y_w| - lr_l / |y_l|                     Eq. 17, arXiv:2310.12036

    Differs from the paper: there h = lr_w - lr_l, `length_normalised=False`. Averaging over tokens is what other
    libraries compute under this name. beta is the paper's tau.

    Attributes:
        length_normalised: Whether log-ratios are averaged over their tokens.
    """

    length_normalised: bool = True

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """(h - 1 / (2 beta))^2."""
        chosen, rejected = pairs.chosen_log_ratios, pairs.rejected_log_ratios
        if self.length_normalised:
            chosen = per_token(chosen, pairs.chosen_lengths)
            rejected = per_token(rejected, pairs.rejected_lengths)
        return (chosen - rejected - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class Robust(PreferenceLoss):
    """DPO made unbiased under labels that are swapped with a known probability.

    loss = [-(1 - e) log s(x) + e log s(-x)] / (1 - 2 e), x = beta (lr_w - lr_l)     arXiv:2403.00409

    Attributes:
        label_smoothing: The probability e of a swap, in [0, 0.5); 0 is DPO.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, 0, 0.5, with_low=True)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """[-(1 - e) log s(x) + e log s(-x)] / (1 - 2 e)."""
        scores, swapped = self.beta * margins(pairs), self.label_smoothing
        return (-(1 - swapped) * logsigmoid(scores) + swapped * logsigmoid(-scores)) / (1 - 2 * swapped)


@dataclass(frozen=True)
class EXOPair(PreferenceLoss):
    """Exact preference optimisation on pairs: the reverse KL between implied and smoothed preferences.

    loss = q_w (log q_w - log(1 - e)) + q_l (log q_l - log e), q_w = s(x), q_l = s(-x), x = beta (lr_w - lr_l)
    Eq. 16, arXiv:2402.00856

    Attributes:
        smoothing: The target preference e for the rejected response, in (0, 0.5); it cannot be 0, unlike the
            `label_smoothing` of other losses, for the divergence from a certain label is infinite.
    """

    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("smoothing", self.smoothing, 0, 0.5)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """KL((q_w, q_l) || (1 - e, e))."""
        scores = self.beta * margins(pairs)
        chosen, rejected = logsigmoid(scores), logsigmoid(-scores)
        target_chosen, target_rejected = math.log(1 - self.smoothing), math.log(self.smoothing)
        return chosen.exp() * (chosen - target_chosen) + rejected.exp() * (rejected - target_rejected)


@dataclass(frozen=True)
class DiscoPOP(PreferenceLoss):
    """The log-ratio modulated loss that a language model discovered: logistic and exponential, blended.

    loss = (1 - m) (-log s(x)) + m exp(-x), m = s(x / tau), x = beta (lr_w - lr_l)   Eq. 5, arXiv:2406.08414

    Attributes:
        tau: Temperature of the blend, > 0.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("tau", self.tau, 0)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """(1 - m) (-log s(x)) + m exp(-x)."""
        scores = self.beta * margins(pairs)
        # m exp(-x) as one exponential: for very negative x its factors are 0 and inf, the product nan.
        exponential = torch.exp(logsigmoid(scores / self.tau) - scores)
        return torch.sigmoid(-scores / self.tau) * -logsigmoid(scores) + exponential
