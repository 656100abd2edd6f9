"""The loader follows the plan, goes on where a checkpoint was, and begins each pass anew otherwise."""

import itertools
import multiprocessing
import signal
import subprocess

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


STEPS = [{"batch_size": 4}, {"batch_size": None, "max_tokens": 40}]


@pytest.mark.parametrize("size", STEPS, ids=["examples", "tokens"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_going_on_from_a_cursor_equals_never_having_stopped(step, workers, size):
    whole = loader(**size)
    want = members(whole) + members(whole)
    stopped = loader(**size)
    got = members(itertools.islice(stopped, 2 * step))
    resumed = loader(num_workers=workers, **size)
    resumed.load_state_dict(stopped.state_dict())
    got += members(resumed)
    got += members(resumed)
    assert got == want


def test_after_the_last_step_of_an_epoch_the_next_begins():
    whole = loader()
    want = members(whole) + members(whole)
    done = loader()
    members(done)
    resumed = loader()
    resumed.load_state_dict(done.state_dict())
    assert members(resumed) == want[12:]


def test_an_epoch_that_is_over_early_is_not_continued():
    whole = loader()
    want = members(whole) + members(whole)
    limited = loader()
    members(itertools.islice(limited, 4))
    resumed = loader()
    limited.epoch_over = lambda: True
    resumed.load_state_dict(limited.state_dict())
    assert members(resumed) == want[12:]


def test_a_step_that_was_only_begun_is_handed_out_again():
    stopped, resumed = loader(), loader()
    members(itertools.islice(stopped, 5))
    resumed.load_state_dict(stopped.state_dict())
    assert members(resumed) == members(loader())[4:]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_that_the_trainer_did_not_get_through_is_handed_out_again(micro_batches):
    whole = members(loader(micro_batches=micro_batches))
    first = loader(micro_batches=micro_batches)
    for seen, _ in enumerate(first):
        first.unfinished = lambda: True
        other = loader(micro_batches=micro_batches)
        other.load_state_dict(first.state_dict())
        first.unfinished = bool
        assert members(other) == whole[seen // micro_batches * micro_batches :]


@pytest.mark.parametrize("size", STEPS, ids=["examples", "tokens"])
def test_a_run_goes_on_over_the_same_steps_with_other_ranks_and_micro_batches(size):
    def steps(sources, micro_batches):
        """The set of examples of each step, over the ranks."""
        ranks = [members(source) for source in sources]
        micro = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
        return [set(itertools.chain(*micro[i : i + micro_batches])) for i in range(0, len(micro), micro_batches)]

    want = steps([loader(**size)], 2)
    stopped = loader(**size)
    members(itertools.islice(stopped, 6))
    others = [loader(rank=rank, world_size=3, micro_batches=5, **size) for rank in range(3)]
    for other in others:
        other.load_state_dict(stopped.state_dict())
    assert steps(others, 5) == want[3:]


def test_steps_in_tokens_may_differ_in_number_and_the_length_follows(monkeypatch):
    monkeypatch.setattr("lit_align.batch.plan.WINDOW", 6)
    source = loader(batch_size=None, max_tokens=40)
    lengths = []
    for _ in range(6):
        lengths.append(len(source))
        assert len(members(source)) == lengths[-1]
    assert len(set(lengths)) > 1


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


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal cannot be told here")
def test_workers_outlive_a_sigterm_from_elsewhere_and_obey_that_of_their_own_process():
    source = iter(loader(num_workers=2))
    first = members([next(source)])
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    subprocess.run(["sh", "-c", f"kill -TERM {' '.join(str(worker.pid) for worker in workers)}"], check=True)
    assert first + members(source) == members(loader())
    source = iter(loader(num_workers=1))
    next(source)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()
