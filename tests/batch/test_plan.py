"""The step plan: every example once an epoch, the same step whatever shares its work, near-equal loads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_align.batch import epoch_order, plan_epoch, split_step

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


def plan(lengths, *, batch_size=8, parts=1, shuffle=True, seed=0, epoch=0):
    weights = np.asarray(lengths) * 0.5
    return plan_epoch(
        np.asarray(lengths), weights, batch_size=batch_size, parts=parts, shuffle=shuffle, seed=seed, epoch=epoch
    )


@given(LENGTHS, st.integers(1, 20), st.integers(1, 6), st.integers(0, 3))
def test_every_example_stands_in_exactly_one_micro_batch(lengths, batch_size, parts, epoch):
    steps = plan(lengths, batch_size=batch_size, parts=parts, epoch=epoch)
    assert sorted(i for step in steps for micro in step for i in micro.indices) == list(range(len(lengths)))
    assert all(len(step) == parts for step in steps)


@given(LENGTHS, st.integers(1, 20), st.integers(2, 6))
def test_more_parts_move_work_but_not_examples(lengths, batch_size, parts):
    whole, split = plan(lengths, batch_size=batch_size), plan(lengths, batch_size=batch_size, parts=parts)
    for one, many in zip(whole, split, strict=True):
        assert set(one[0].indices) == {i for micro in many for i in micro.indices}
        assert {micro.totals for micro in many} == {one[0].totals}


@given(LENGTHS, st.integers(1, 20))
def test_totals_are_those_of_the_whole_step(lengths, batch_size):
    for step in plan(lengths, batch_size=batch_size, parts=3):
        members = [i for micro in step for i in micro.indices]
        assert step[0].totals.examples == len(members)
        assert step[0].totals.tokens == pytest.approx(0.5 * sum(lengths[i] for i in members), rel=1e-12)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 6))
def test_the_heaviest_part_is_within_one_example_of_the_mean(lengths, parts):
    groups = split_step(range(len(lengths)), np.asarray(lengths), parts)
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert max(loads) <= sum(lengths) / parts + max(lengths)


def test_order_is_a_function_of_seed_and_epoch():
    first, again = epoch_order(50, shuffle=True, seed=1, epoch=2), epoch_order(50, shuffle=True, seed=1, epoch=2)
    assert (first == again).all()
    assert (first != epoch_order(50, shuffle=True, seed=1, epoch=3)).any()
    assert (first != epoch_order(50, shuffle=True, seed=2, epoch=2)).any()
    assert epoch_order(5, shuffle=False, seed=1, epoch=2).tolist() == [0, 1, 2, 3, 4]


def test_fewer_examples_than_parts_leave_empty_micro_batches():
    (step,) = plan([5, 7], batch_size=8, parts=4)
    assert sorted(len(micro.indices) for micro in step) == [0, 0, 1, 1]


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        plan([1], batch_size=0)
