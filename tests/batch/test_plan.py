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


@given(LENGTHS, st.integers(1, 800), st.integers(1, 4), st.integers(0, 3))
def test_in_file_order_a_step_in_tokens_holds_as_many_examples_as_fit(lengths, max_tokens, parts, epoch):
    numbers = np.asarray(lengths)
    options = {"max_tokens": max_tokens, "shuffle": False, "seed": 0, "epoch": epoch}
    steps = plan_epoch(numbers, numbers * 0.5, parts=parts, **options)
    held = [list(steps.examples(s)) for s in range(len(steps))]
    assert [i for step in held for i in step] == list(range(len(lengths)))
    for step, after in zip(held, [*held[1:], None], strict=True):
        load = sum(lengths[i] for i in step)
        assert load <= max_tokens or len(step) == 1
        assert after is None or load + lengths[after[0]] > max_tokens


@given(LENGTHS, st.integers(1, 800), st.integers(0, 3))
def test_shuffled_steps_in_tokens_are_packed_best_fit(lengths, max_tokens, epoch):
    numbers = np.asarray(lengths)
    options = {"max_tokens": max_tokens, "shuffle": True, "seed": 0, "epoch": epoch}
    steps = plan_epoch(numbers, numbers * 0.5, parts=1, **options)
    held = [steps.examples(s).tolist() for s in range(len(steps))]
    loads = [sum(lengths[i] for i in step) for step in held]
    assert sorted(i for step in held for i in step) == list(range(len(lengths)))
    assert all(load <= max_tokens or len(step) == 1 for step, load in zip(held, loads, strict=True))
    # No two steps fit into one: no example was given a step of its own that another step had room for.
    rooms = sorted(load for load in loads if load <= max_tokens)
    assert len(rooms) < 2 or rooms[0] + rooms[1] > max_tokens
    again = plan_epoch(numbers, numbers * 0.5, parts=3, **options)
    assert [again.examples(s).tolist() for s in range(len(again))] == held


def test_windows_of_shuffled_examples_are_packed_nearly_full_and_differ_from_epoch_to_epoch():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 20_000).astype(int).clip(8, 4096)
    epochs = [
        plan_epoch(lengths, lengths * 1.0, max_tokens=4096, parts=1, shuffle=True, seed=0, epoch=epoch)
        for epoch in range(2)
    ]
    for plan_of_epoch in epochs:
        assert lengths.sum() / (len(plan_of_epoch) * 4096) > 0.985
    partners = [{tuple(sorted(p.examples(s).tolist())) for s in range(len(p))} for p in epochs]
    assert len(partners[0] & partners[1]) < 0.01 * len(partners[0])
    first = [np.mean(lengths[epochs[0].examples(s)]) for s in range(100)]
    last = [np.mean(lengths[epochs[0].examples(s)]) for s in range(len(epochs[0]) - 100, len(epochs[0]))]
    assert 0.7 < np.mean(first) / np.mean(last) < 1.4  # long examples are not all at the beginning


def test_copies_say_how_often_an_epoch_visits_an_example():
    copies = np.array([1.0] * 10 + [2.0] * 10 + [0.5] * 10 + [1.25] * 8)
    orders = [epoch_order(38, shuffle=shuffle, seed=0, epoch=e, copies=copies) for e in range(3) for shuffle in (0, 1)]
    for order in orders:
        counts = np.bincount(order, minlength=38)
        assert (counts[:10] == 1).all() and (counts[10:20] == 2).all()
        assert set(counts[20:30]) == {0, 1} and counts[20:30].sum() == 5
        assert set(counts[30:]) == {1, 2} and counts[30:].sum() == 10
    drawn = [tuple(np.bincount(order, minlength=38)[20:30]) for order in orders[::2]]
    assert len(set(drawn)) > 1
    again = epoch_order(38, shuffle=True, seed=0, epoch=2, copies=copies)
    assert (again == orders[-1]).all()


def test_an_example_that_a_step_holds_twice_is_numbered():
    numbers, copies = np.array([5, 3, 4]), np.array([3.0, 1.0, 2.0])
    options = {"batch_size": 6, "shuffle": True, "seed": 0, "epoch": 0, "copies": copies}
    for parts in (1, 4):
        (step,) = plan_epoch(numbers, numbers * 0.5, parts=parts, **options)
        pairs = sorted(pair for micro in step for pair in zip(micro.indices, micro.repeats, strict=True))
        assert pairs == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("size", [{"batch_size": 2}, {"max_tokens": 9}])
def test_an_epoch_that_visits_nothing_is_refused(size):
    """A source of 4 examples and weight 0.1 would train nothing, without a word."""
    ones, few = np.ones(4, dtype=int), np.full(4, 0.1)
    with pytest.raises(ValueError, match="visits none of the 4 examples"):
        plan_epoch(ones, ones * 1.0, parts=1, shuffle=True, seed=0, epoch=0, copies=few, **size)


@pytest.mark.parametrize("copies", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_examples_cannot_be_visited_less_than_never(copies):
    with pytest.raises(ValueError, match="copies: expected numbers above 0"):
        epoch_order(2, shuffle=False, seed=0, epoch=0, copies=np.array(copies))


def test_a_step_is_given_in_examples_or_in_tokens():
    for sizes in ({}, {"batch_size": 2, "max_tokens": 10}):
        with pytest.raises(ValueError, match="expected one of them"):
            plan_epoch(np.ones(3), np.ones(3), parts=1, shuffle=False, seed=0, epoch=0, **sizes)


def test_fewer_examples_than_parts_leave_empty_micro_batches():
    (step,) = plan([5, 7], batch_size=8, parts=4)
    assert sorted(len(micro.indices) for micro in step) == [0, 0, 1, 1]


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        plan([1], batch_size=0)
