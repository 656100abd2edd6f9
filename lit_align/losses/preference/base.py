"""What a preference loss receives and what every one of them offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from lit_align.losses.checks import check_ndim, check_range, check_same_shape


class PreferenceLogps(NamedTuple):
    """Log-probabilities of B preference pairs, all float [B].

    Attributes:
        policy_chosen: log pi(y_w | x) in nats, summed over the response's tokens (prompt excluded).
        policy_rejected: log pi(y_l | x), summed.
        reference_chosen: log pi_ref(y_w | x), summed, constant; zeros for reference-free losses.
        reference_rejected: log pi_ref(y_l | x), summed, constant; zeros for reference-free losses.
        chosen_lengths: Number of tokens summed over in y_w.
        rejected_lengths: Number of tokens summed over in y_l.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def chosen_log_ratios(self) -> Tensor:
        """Log-ratio of the chosen response: log pi(y_w | x) - log pi_ref(y_w | x), [B]."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_log_ratios(self) -> Tensor:
        """Log-ratio of the rejected response: log pi(y_l | x) - log pi_ref(y_l | x), [B]."""
        return self.policy_rejected - self.reference_rejected


@dataclass(frozen=True)
class PreferenceLoss(ABC):
    """A loss on preference pairs: called with `PreferenceLogps`, returns one value per pair, [B], unreduced.

    Chosen in a config by `class_path`; a loss of one's own is a frozen dataclass that derives from this class and
    says in `per_pair` what it computes. The caller sums over pairs and divides by the pairs of the optimizer step.

    In the equations of the subclasses lr_w = log pi(y_w|x) - log pi_ref(y_w|x), lr_l likewise, |y| is a response's
    number of tokens and s is the logistic function.

    All defaults of beta are equal, and a coefficient of the same name means the same thing in every loss: a config that
    names another class keeps the coefficients that the class before it had.

    Attributes:
        beta: Strength of the pull towards the reference (inverse temperature of the implicit reward), > 0.
    """

    beta: float = 0.1
    reference_free: ClassVar[bool] = False
    """True = the loss never looks at a reference model, so none is needed."""
    couples_pairs: ClassVar[bool] = False
    """True = a pair's value depends on the other pairs of the call, so the loss depends on how a step is split."""

    def __post_init__(self) -> None:
        """Checks the coefficients."""
        check_range("beta", self.beta, 0)

    def __call__(self, pairs: PreferenceLogps) -> Tensor:
        """Loss of each pair, [B], unreduced.

        Raises:
            ValueError: The tensors are not all [B].
        """
        check_ndim(1, policy_chosen=pairs.policy_chosen)
        check_same_shape(**pairs._asdict())
        return self.per_pair(pairs)

    @abstractmethod
    def per_pair(self, pairs: PreferenceLogps) -> Tensor:
        """The formula: [B] tensors in, [B] out."""

    def rewards(self, pairs: PreferenceLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected responses, each [B], detached, for metrics.

        beta * log-ratio (Eq. 5 of arXiv:2305.18290 without the term that cancels in a pair) for every loss that has a
        reference, length-normalised ones included, so that the numbers of different losses can be compared.
        """
        chosen, rejected = self.beta * pairs.chosen_log_ratios, self.beta * pairs.rejected_log_ratios
        return chosen.detach(), rejected.detach()


def per_token(values: Tensor, lengths: Tensor) -> Tensor:
    """Summed values [B] divided by their number of tokens [B]; a response without tokens gives 0."""
    return values / lengths.clamp(min=1)
