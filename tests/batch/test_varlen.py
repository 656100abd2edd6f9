"""Bounds and indices for attention with variable lengths, against a walk over the segments token by token."""

import pytest
import torch

from lit_align.batch import Branch, Example, Segment, StepTotals, pack, pad, varlen

TOTALS = StepTotals(1.0, 1.0)


def packed(*examples):
    def ids(n):
        return torch.ones(n, dtype=torch.long)

    items = [Example(ids(prefix), tuple(Branch(ids(n), torch.ones(n)) for n in sizes)) for prefix, *sizes in examples]
    return pack(items, range(len(items)), TOTALS)


def test_a_prefix_is_joined_with_its_first_branch():
    found = packed((3, 2, 1), (1, 1, 2)).varlen
    assert found.spans == (Segment(0, 5), Segment(5, 6, 0, 3), Segment(6, 8), Segment(8, 10, 6, 7))
    assert found.cu_seqlens_q.tolist() == [0, 5, 6, 8, 10] and found.cu_seqlens_q.dtype == torch.int32
    assert found.cu_seqlens_k.tolist() == [0, 5, 9, 11, 14] and found.cu_seqlens_k.dtype == torch.int32
    assert (found.max_q, found.max_k) == (5, 5)
    assert found.gather.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9]
    assert found.gather.own.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 12, 13]
    assert found.gather.prefix.tolist() == [0, 1, 2, 6]
    assert found.gather.copies.tolist() == [[5], [6], [7], [11]]


@pytest.mark.parametrize("examples", [[(0, 4), (0, 1)], [(3, 5), (2, 2)], []], ids=["documents", "answers", "empty"])
def test_nothing_is_gathered_where_nothing_is_shared(examples):
    found = packed(*examples).varlen
    assert found.gather is None and torch.equal(found.cu_seqlens_q, found.cu_seqlens_k)


@pytest.mark.parametrize("examples", [[(3, 2, 1, 4)], [(0, 2, 3), (5, 1, 1), (2, 7, 3)], [(1, 1, 1, 1, 1)] * 3])
def test_each_key_stands_once_in_its_own_span_and_once_in_each_other_that_sees_it(examples):
    found = packed(*examples).varlen
    expected = [[*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)] for s in found.spans]
    assert found.gather.keys.tolist() == [key for keys in expected for key in keys]
    places = torch.cat([found.gather.own, found.gather.copies.flatten()])
    assert sorted(places.tolist()) == list(range(len(found.gather.keys)))
    assert torch.equal(found.gather.keys[found.gather.own], torch.arange(len(found.gather.own)))
    assert (found.gather.keys[found.gather.copies] == found.gather.prefix[:, None]).all()


def test_unequally_many_branches_are_refused():
    segments = [Segment(0, 2), Segment(2, 3, 0, 2), Segment(3, 4, 0, 2), Segment(4, 5), Segment(5, 6, 4, 5)]
    segments += [Segment(6, 7, 4, 5), Segment(7, 8, 4, 5)]
    with pytest.raises(ValueError, match="equally many branches"):
        varlen(segments)


def test_it_moves_with_its_batch_and_padded_ones_have_none():
    batch = packed((3, 2, 1))
    moved = batch.to("meta").varlen
    assert moved.cu_seqlens_q.is_meta and moved.gather.copies.is_meta and moved.spans == batch.varlen.spans
    assert pad([], [], TOTALS).varlen is None
