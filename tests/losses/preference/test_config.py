"""Preference losses are chosen on the command line by name, with their own arguments."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lit_align.losses import IPO, PreferenceLoss, Sigmoid
from tests.losses.preference.examples import LOSS_CLASSES


class Stage:
    def __init__(self, loss: PreferenceLoss = Sigmoid(beta=0.1)) -> None:  # noqa: B008 (frozen)
        self.loss = loss


def chosen_loss(*arguments: str) -> PreferenceLoss:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Stage, "model")
    return parser.instantiate(parser.parse_args(list(arguments))).model.loss


def test_a_short_name_and_an_argument_choose_a_loss():
    assert chosen_loss("--model.loss=IPO", "--model.loss.beta=0.5") == IPO(beta=0.5)


def test_without_a_name_the_default_stays_and_takes_arguments():
    assert chosen_loss() == Sigmoid(beta=0.1)
    assert chosen_loss("--model.loss.beta=0.3") == Sigmoid(beta=0.3)


@pytest.mark.parametrize("loss_class", LOSS_CLASSES, ids=lambda c: c.__name__)
def test_every_loss_is_found_by_its_short_name_and_keeps_its_defaults(loss_class):
    assert chosen_loss(f"--model.loss={loss_class.__name__}") == loss_class()


def test_a_class_path_in_a_mapping_chooses_a_loss():
    text = '{"class_path": "lit_align.losses.Sigmoid", "init_args": {"label_smoothing": 0.1}}'
    assert chosen_loss(f"--model.loss={text}") == Sigmoid(beta=0.1, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--model.loss.betta=0.3", "betta"),
        ("--model.loss=Sigmoids", "Sigmoids"),
        ("--model.loss.beta=much", "much"),
        ("--model.loss=PreferenceLoss", "abstract"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(argument, named):
    with pytest.raises(ArgumentError, match=named):
        chosen_loss("--model.loss=Sigmoid", argument)
