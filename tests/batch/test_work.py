"""The numbers of a micro-batch, against the micro-batch itself."""

import pytest
import torch

from lit_align.batch import Branch, Example, StepTotals, Work, pack, pad

TOTALS = StepTotals(1.0, 1.0)
SIZES = [(5, 3, 4), (1, 2, 2), (0, 7, 6)]  # prefix, two branches


def examples(sizes=SIZES):
    ids = torch.arange(1, 50)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0, 1.0])
    return [Example(ids[:p], tuple(Branch(ids[:n], weights[:n]) for n in branches)) for p, *branches in sizes]


def seen_by(segment):
    """Keys of each query of a segment, counted one by one; its own key counts half."""
    prefix = segment.prefix_stop - segment.prefix_start
    return sum(prefix + row + 0.5 for row in range(segment.stop - segment.start))


def test_a_packed_row_holds_nothing_twice():
    batch = pack(examples(), range(3), TOTALS)
    work = batch.work
    assert work.tokens == work.computed == batch.input_ids.numel() == batch.num_tokens == 30
    assert work.unshared == 30 + 5 + 1
    assert work.padding == 0 and (work.examples, work.sequences) == (3, 6)
    assert work.scored == len(batch.scored)
    assert work.attended == sum(seen_by(segment) for segment in batch.segments)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rectangle_is_the_same_work_with_padding_and_repeated_prompts(side):
    batch = pad(examples(), range(3), TOTALS, padding_side=side)
    work = batch.work
    assert work.computed == batch.input_ids.numel() == 6 * 9
    assert work.padding == int((batch.attention_mask == 0).sum())
    assert work.computed - work.padding == work.unshared == 36
    packed = pack(examples(), range(3), TOTALS).work
    assert work == packed._replace(computed=work.computed, padding=work.padding)


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_a_rank_with_nothing_to_do_computes_one_token_that_does_not_count(lay_out):
    batch = lay_out([], [], TOTALS)
    assert batch.work.tokens == batch.work.scored == 0
    assert batch.work.computed == batch.input_ids.numel() == 1


def test_the_numbers_are_plain_and_stay_when_the_batch_moves():
    batch = pack(examples(), range(3), TOTALS)
    assert all(type(number) in (int, float) for number in batch.work)
    assert batch.to("cpu").work is batch.work and isinstance(batch.to("meta").work, Work)
