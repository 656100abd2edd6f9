"""Running moments are those of everything seen, in whatever batches it came."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_align.rollout.moments import RunningMoments

NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)


@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_merged_moments_are_those_of_all_numbers(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    numbers = np.concatenate(batches)
    assert moments.count == len(numbers)
    assert moments.mean == pytest.approx(numbers.mean(), rel=1e-9, abs=1e-9)
    assert moments.squares == pytest.approx(numbers.var() * len(numbers), rel=1e-6, abs=1e-6)


def test_scaling_counts_the_batch_in_and_keeps_its_mean():
    moments = RunningMoments()
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([10.0, -2.0, 4.0])
    assert torch.equal(moments.scaled(first), first)  # their standard deviation is 1
    spread = torch.cat([first, second]).std(correction=0)
    assert torch.allclose(moments.scaled(second), second / spread)


def test_equal_scores_are_left_as_they_are():
    assert torch.equal(RunningMoments().scaled(torch.full((4,), 2.5)), torch.full((4,), 2.5))


def test_the_state_is_plain_and_complete():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 2.0, 5.0]))
    other = RunningMoments(**moments.as_dict())
    assert all(type(value) is float for value in moments.as_dict().values())
    assert torch.equal(other.scaled(torch.tensor([3.0])), moments.scaled(torch.tensor([3.0])))
