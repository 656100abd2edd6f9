"""Alignment via optimal transport: distributions of rewards are compared, not single pairs.

Both losses sort over the pairs of one call. They see those pairs and no others, so the loss of an optimizer step
depends on how the step is split into calls (micro-batches, ranks): `couples_pairs` is True. Entry i of the result is
the i-th quantile, not the i-th pair; only sums over the whole result have a meaning. They cannot look across the whole
step: the margins of all its micro-batches would have to be known before the backward pass of the first one, which
costs another forward pass of the policy over the step. Give the step to one micro-batch on one device instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_align.losses.checks import check_range
from lit_align.losses.preference.base import PreferenceLogps, PreferenceLoss
from lit_align.losses.preference.relative import smoothed_logistic


@dataclass(frozen=True)
class AOT(PreferenceLoss):
    """Paired optimal transport: the policy's sorted margins should exceed the reference's sorted margins.

    D = sort(log pi(y_w) - log pi(y_l)) - sort(log pi_ref(y_w) - log pi_ref(y_l)), over the pairs of this call
    loss = -(1 - e) log s(beta D) - e log s(-beta D)                                 arXiv:2406.05882

    Needs many pairs in one call for its quantiles to mean something; with one pair it is DPO.

    Attributes:
        label_smoothing: The probability e of a swap, in [0, 0.5).
    """

    label_smoothing: float = 0.0
    couples_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, 0, 0.5, with_low=True)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """Smoothed logistic loss of each quantile's difference."""
        policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
        reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
        return smoothed_logistic(self.beta * (policy - reference), self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(PreferenceLoss):
    """Unpaired optimal transport: the sorted log-ratios of all chosen should exceed those of all rejected.

    D = sort(lr_w) - sort(lr_l), over the pairs of this call
    loss = -(1 - e) log s(beta D) - e log s(-beta D)                                 arXiv:2406.05882

    Needs many pairs in one call for its quantiles to mean something; with one pair it is DPO.

    Attributes:
        label_smoothing: The probability e of a swap, in [0, 0.5).
    """

    label_smoothing: float = 0.0
    couples_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, 0, 0.5, with_low=True)

    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """Smoothed logistic loss of each quantile's difference."""
        chosen, rejected = pairs.chosen_log_ratios.sort().values, pairs.rejected_log_ratios.sort().values
        return smoothed_logistic(self.beta * (chosen - rejected), self.label_smoothing)
