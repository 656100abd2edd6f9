"""Held-out data shares no prompt with the training data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.splitting import hold_out


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_and_both_sides_have_one(keys, fraction, seed):
    keys = np.array(keys + keys[:3], dtype=np.int64)
    if len(np.unique(keys)) < 2:
        return
    held_out = hold_out(keys, fraction, seed)
    assert not set(keys[held_out]) & set(keys[~held_out])
    assert held_out.any() and not held_out.all()
    distinct = len(np.unique(keys))
    expected = min(max(round(fraction * distinct), 1), distinct - 1)
    assert len(np.unique(keys[held_out])) == expected


def test_the_choice_follows_the_seed_alone():
    keys = np.arange(100)
    assert np.array_equal(hold_out(keys, 0.2, 1), hold_out(keys, 0.2, 1))
    assert not np.array_equal(hold_out(keys, 0.2, 1), hold_out(keys, 0.2, 2))
    assert set(keys[hold_out(keys[::-1], 0.2, 1)[::-1]]) == set(keys[hold_out(keys, 0.2, 1)])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 3])
def test_what_is_no_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="a fraction between 0 and 1"):
        hold_out(np.arange(4), fraction, 0)


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(ValueError, match="all 3 examples have the same prompt"):
        hold_out(np.zeros(3, dtype=np.int64), 0.5, 0)
