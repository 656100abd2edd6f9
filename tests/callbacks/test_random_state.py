import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_align.callbacks.random_state import RandomState, random_state, set_random_state


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), random.gauss(0, 1)


def trainer(world_size=1, rank=0):
    return SimpleNamespace(world_size=world_size, global_rank=rank)


def test_what_is_drawn_after_restoring_is_what_was_drawn_after_saving():
    random.gauss(0, 1)  # leaves a second number behind, which belongs to the state
    state = random_state()
    expected = draw()
    draw()
    set_random_state(state)
    assert draw() == expected


def test_the_state_survives_a_checkpoint_that_is_loaded_with_weights_only(tmp_path):
    state, expected = RandomState().state_dict(), draw()
    torch.save(state, tmp_path / "state.pt")
    callback = RandomState()
    callback.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    draw()
    callback.on_train_start(trainer(), None)
    assert draw() == expected


def test_it_is_restored_when_training_starts_and_only_once():
    callback = RandomState()
    callback.load_state_dict(callback.state_dict())
    expected = draw()
    callback.on_train_start(trainer(), None)
    assert draw() == expected
    callback.on_train_start(trainer(), None)
    assert draw() != expected


def test_each_rank_gets_its_own_state():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(random_state())
    callback = RandomState()
    callback.load_state_dict({"ranks": states})
    callback.on_train_start(trainer(world_size=2, rank=1), None)
    torch_numbers = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(torch_numbers, torch.rand(3))


def test_another_number_of_ranks_is_said():
    callback = RandomState()
    callback.load_state_dict({"ranks": [random_state()]})
    with pytest.warns(UserWarning, match="states of 1 ranks, this run has 2"):
        callback.on_train_start(trainer(world_size=2, rank=1), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_train_start(trainer(), None)
