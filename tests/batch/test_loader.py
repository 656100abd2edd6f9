"""The loader follows the plan, goes on where a checkpoint was, and begins each pass anew otherwise."""

import itertools

import numpy as np
import pytest

from lit_align.batch import PlannedLoader

NUMBERS = list(range(23))


def collate(examples, plan):
    return tuple(examples), plan


def loader(**options):
    settings = {"batch_size": 4, "micro_batches": 2, "seed": 3} | options
    return PlannedLoader(NUMBERS, collate, lengths=np.arange(1, 24), trained_weights=np.ones(23), **settings)


def members(batches):
    return [examples for examples, _ in batches]


def test_each_epoch_holds_every_example_once_in_an_order_of_its_own():
    source = loader()
    first, second = members(source), members(source)
    assert len(first) == len(source) == 12
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == NUMBERS
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 11, 12])
def test_going_on_from_a_cursor_equals_never_having_stopped(stop, workers):
    whole = loader()
    want = members(whole) + members(whole)
    stopped = loader()
    got = members(itertools.islice(stopped, stop))
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    got += members(resumed)
    got += members(resumed)
    if stop == 12:  # the epoch was over: resuming goes on with the next one, and one more was read here
        got = got[:24]
    assert got == want


def test_a_pass_that_was_broken_off_is_not_continued_without_a_checkpoint():
    source = loader(shuffle=False)
    members(itertools.islice(source, 3))
    assert members(source) == members(loader(shuffle=False))


def test_ranks_share_each_step():
    one = loader(micro_batches=1)
    ranks = [loader(micro_batches=1, rank=r, world_size=2) for r in (0, 1)]
    for (whole, plan), (a, plan_a), (b, plan_b) in zip(one, *ranks, strict=True):
        assert sorted(whole) == sorted(a + b)
        assert plan.totals == plan_a.totals == plan_b.totals


def test_loading_does_not_touch_the_global_random_numbers():
    import torch

    before = torch.get_rng_state()
    members(loader(num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no example"):
        PlannedLoader([], collate, lengths=np.array([]), trained_weights=np.array([]), batch_size=1)
