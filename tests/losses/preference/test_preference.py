"""What holds for preference losses by their definition: identities, limits, special cases, refusals."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch.testing import assert_close

import lit_align.losses
from lit_align.losses import (
    AOT,
    IPO,
    ORPO,
    AOTUnpaired,
    EXOPair,
    Hinge,
    PreferenceLogps,
    PreferenceLoss,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
)
from tests.losses.preference.examples import LOSS_CLASSES, pairs_at_reference, random_pairs, trainable

every_loss = pytest.mark.parametrize("loss_class", LOSS_CLASSES, ids=lambda c: c.__name__)


def test_the_list_of_losses_is_complete():
    exported = [getattr(lit_align.losses, name) for name in lit_align.losses.__all__]
    classes = {c for c in exported if isinstance(c, type) and issubclass(c, PreferenceLoss)}
    assert classes - {PreferenceLoss} == set(LOSS_CLASSES)


@pytest.mark.parametrize("loss", [Sigmoid(), Sigmoid(label_smoothing=0.2), SigmoidNorm(), Robust(), AOT()], ids=repr)
def test_at_the_reference_the_loss_is_ln_2(loss):
    assert_close(loss(pairs_at_reference()), torch.full((4,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-12)


def test_at_the_reference_the_float32_loss_is_ln_2_exactly():
    pairs = PreferenceLogps(*(t.float() for t in pairs_at_reference()))
    assert (Sigmoid()(pairs) == torch.tensor(math.log(2))).all()


@every_loss
def test_one_value_per_pair_and_its_dtype(loss_class):
    loss = loss_class()(random_pairs(5, dtype=torch.float32))
    assert loss.shape == (5,) and loss.dtype == torch.float32


@every_loss
def test_no_pairs_give_an_empty_loss_with_a_backward(loss_class):
    pairs = trainable(random_pairs(0))
    loss_class()(pairs).sum().backward()
    assert pairs.policy_chosen.grad.shape == (0,)


@every_loss
def test_the_policy_that_prefers_chosen_has_the_lower_loss(loss_class):
    pairs = random_pairs(1)._replace(
        policy_chosen=torch.tensor([-1.0]),
        policy_rejected=torch.tensor([-6.0]),
        reference_chosen=torch.tensor([-3.0]),
        reference_rejected=torch.tensor([-3.0]),
        chosen_lengths=torch.tensor([3.0]),
        rejected_lengths=torch.tensor([3.0]),
    )
    swapped = pairs._replace(policy_chosen=pairs.policy_rejected, policy_rejected=pairs.policy_chosen)
    assert loss_class()(pairs) < loss_class()(swapped)


@every_loss
@pytest.mark.parametrize("far", [-1000.0, 1000.0])
def test_far_from_the_reference_loss_and_gradient_stay_finite(loss_class, far):
    pairs = random_pairs(3, dtype=torch.float32)
    shift = torch.full((3,), min(far, 0.0))
    pairs = trainable(
        pairs._replace(
            policy_chosen=pairs.policy_chosen + shift, policy_rejected=pairs.policy_rejected - abs(far) - shift
        )
    )
    loss = loss_class()(pairs)
    loss.sum().backward()
    for values in (loss, pairs.policy_chosen.grad, pairs.policy_rejected.grad):
        assert values.isfinite().all()


@every_loss
def test_a_response_of_probability_one_gives_finite_numbers(loss_class):
    certain = torch.zeros(2)
    pairs = trainable(PreferenceLogps(certain, certain, certain, certain, certain + 3, certain + 2))
    loss = loss_class()(pairs)
    loss.sum().backward()
    assert loss.isfinite().all() and pairs.policy_chosen.grad.isfinite().all()


@every_loss
def test_only_losses_that_say_so_couple_the_pairs_of_a_call(loss_class):
    pairs, loss = random_pairs(8), loss_class()
    halves = [PreferenceLogps(*(t[part] for t in pairs)) for part in (slice(0, 3), slice(3, 8))]
    split = torch.cat([loss(half) for half in halves])
    assert torch.allclose(split.sum(), loss(pairs).sum(), rtol=1e-12) != loss.couples_pairs


@every_loss
def test_reference_free_losses_and_only_they_ignore_the_reference(loss_class):
    pairs, loss = random_pairs(), loss_class()
    other = pairs._replace(reference_chosen=pairs.reference_chosen - 1, reference_rejected=pairs.reference_rejected - 3)
    same_loss = torch.equal(loss(pairs), loss(other))
    same_rewards = torch.equal(torch.stack(loss.rewards(pairs)), torch.stack(loss.rewards(other)))
    assert same_loss == same_rewards == loss.reference_free
    assert loss.reference_free == (loss_class in (ORPO, SimPO))


def test_rewards_are_beta_times_the_log_ratios_and_carry_no_gradient():
    pairs = trainable(random_pairs())
    chosen, rejected = IPO(beta=0.25).rewards(pairs)
    assert_close(chosen, 0.25 * (pairs.policy_chosen - pairs.reference_chosen).detach())
    assert_close(rejected, 0.25 * (pairs.policy_rejected - pairs.reference_rejected).detach())
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("loss", [ORPO(beta=0.5), SimPO(beta=0.5)], ids=repr)
def test_rewards_without_a_reference_are_beta_times_the_average_logps(loss):
    pairs = trainable(random_pairs())
    chosen, rejected = loss.rewards(pairs)
    assert_close(chosen, 0.5 * (pairs.policy_chosen / pairs.chosen_lengths).detach())
    assert_close(rejected, 0.5 * (pairs.policy_rejected / pairs.rejected_lengths).detach())
    assert not chosen.requires_grad and not rejected.requires_grad


def test_special_cases_agree():
    pairs = random_pairs()
    one_token = pairs._replace(chosen_lengths=torch.ones_like(pairs[4]), rejected_lengths=torch.ones_like(pairs[5]))
    dpo = Sigmoid(beta=0.3)(pairs)
    assert_close(Robust(beta=0.3)(pairs), dpo)
    assert_close(SigmoidNorm(beta=0.3)(one_token), dpo)
    assert_close(IPO(beta=0.3, length_normalised=False)(pairs), IPO(beta=0.3)(one_token))
    single = PreferenceLogps(*(t[:1] for t in pairs))
    assert_close(AOT(beta=0.3)(single), dpo[:1])
    assert_close(AOTUnpaired(beta=0.3)(single), dpo[:1])


def test_hinge_has_no_gradient_beyond_its_margin():
    pairs = trainable(
        random_pairs(1)._replace(policy_chosen=torch.tensor([0.0]), reference_chosen=torch.tensor([-99.0]))
    )
    Hinge(beta=0.5)(pairs).sum().backward()
    assert pairs.policy_chosen.grad.item() == 0


@every_loss
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_beta_that_is_not_positive_is_refused(loss_class, beta):
    with pytest.raises(ValueError, match=r"beta must lie in \(0, inf\)"):
        loss_class(beta=beta)


@pytest.mark.parametrize(
    ("loss_class", "arguments"),
    [
        (Sigmoid, {"label_smoothing": 0.5}),
        (Sigmoid, {"label_smoothing": -0.1}),
        (Robust, {"label_smoothing": 0.5}),
        (AOT, {"label_smoothing": 0.6}),
        (AOTUnpaired, {"label_smoothing": 0.6}),
        (EXOPair, {"smoothing": 0.0}),
        (SimPO, {"gamma_beta_ratio": -1.0}),
        (lit_align.losses.DiscoPOP, {"tau": 0.0}),
    ],
)
def test_coefficients_out_of_range_are_refused_by_name(loss_class, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        loss_class(**arguments)


@every_loss
def test_columns_are_refused_instead_of_broadcast(loss_class):
    pairs = random_pairs(4)
    with pytest.raises(ValueError, match=r"reference_chosen.*expected \(4,\), got \(4, 1\)"):
        loss_class()(pairs._replace(reference_chosen=pairs.reference_chosen[:, None]))
    with pytest.raises(ValueError, match="policy_chosen must have 1 dimension"):
        loss_class()(PreferenceLogps(*(t[:, None] for t in pairs)))


def test_losses_are_values_that_pickle_compare_and_do_not_change():
    loss = Sigmoid(beta=0.2, label_smoothing=0.1)
    assert pickle.loads(pickle.dumps(loss)) == loss == Sigmoid(0.2, 0.1)
    with pytest.raises(FrozenInstanceError):
        loss.beta = 1.0


def test_a_loss_of_ones_own_needs_one_method():
    @dataclass(frozen=True)
    class Linear(PreferenceLoss):
        def per_pair(self, pairs):
            return -self.beta * (pairs.chosen_log_ratios - pairs.rejected_log_ratios)

    pairs = random_pairs(2)
    chosen, rejected = Linear(beta=2.0).rewards(pairs)
    assert_close(Linear(beta=2.0)(pairs), rejected - chosen)
