"""Layouts: positions, segments, scored table, against a reference that walks the examples token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_align.batch import Branch, Example, Segment, StepTotals, pack, pad

TOTALS = StepTotals(7.0, 2.0)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def branch(*values: int, weights=None) -> Branch:
    weights = torch.tensor(weights or [1.0] * len(values))
    return Branch(ids(*values), weights, {"number": torch.arange(len(values)) * 1.0})


PAIRS = [
    Example(ids(1, 2, 3), (branch(4, 5), branch(6, 7, 8, weights=[1.0, 0.0, 0.5])), {"margin": 0.5}),
    Example(ids(9), (branch(10), branch(11)), {"margin": 2.0}),
]


def test_a_pair_hangs_from_its_prompt_in_one_row():
    batch = pack(PAIRS, [12, 3], TOTALS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1]]
    assert batch.segments == (
        Segment(0, 3),
        Segment(3, 5, 0, 3),
        Segment(5, 8, 0, 3),
        Segment(8, 9),
        Segment(9, 10, 8, 9),
        Segment(10, 11, 8, 9),
    )
    assert batch.scored.targets.tolist() == [4, 5, 6, 8, 10, 11]
    assert batch.scored.sources.tolist() == [2, 3, 2, 6, 8, 8]
    assert batch.scored.sequences.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.scored.weights.tolist() == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert batch.tokens["number"].tolist() == [0.0, 1.0, 0.0, 2.0, 0.0, 0.0]
    assert batch.ends.tolist() == [4, 7, 9, 10]
    assert batch.groups.tolist() == [[0, 1], [2, 3]]
    assert batch.values["margin"].tolist() == [0.5, 2.0]
    assert batch.indices.tolist() == [12, 3]
    assert batch.num_tokens == 11 and batch.attention_mask is None


def test_the_same_pair_padded_repeats_its_prompt():
    batch = pad(PAIRS, [12, 3], TOTALS, pad_token_id=99)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5, 99],
        [1, 2, 3, 6, 7, 8],
        [9, 10, 99, 99, 99, 99],
        [9, 11, 99, 99, 99, 99],
    ]
    assert batch.attention_mask.tolist() == [[1] * 5 + [0], [1] * 6, [1, 1] + [0] * 4, [1, 1] + [0] * 4]
    assert batch.scored.sources.tolist() == [2, 3, 8, 10, 12, 18]
    assert batch.ends.tolist() == [4, 11, 13, 19]
    left = pad(PAIRS, [12, 3], TOTALS, pad_token_id=99, padding_side="left")
    assert left.input_ids.tolist()[2] == [99, 99, 99, 99, 9, 10]
    assert left.position_ids.tolist()[2] == [0, 0, 0, 0, 0, 1]
    assert left.ends.tolist() == [5, 11, 17, 23]


def test_the_first_token_of_a_document_is_never_scored():
    batch = pack([Example(ids(), (branch(5, 6, 7),))], [0], TOTALS)
    assert batch.scored.targets.tolist() == [6, 7]
    assert batch.scored.sources.tolist() == [0, 1]
    assert Example(ids(), (branch(5, 6, 7),)).trained_weight == 2.0


def test_nothing_packs_to_one_unscored_token():
    for batch in (pack([], [], TOTALS), pad([], [], TOTALS)):
        assert batch.input_ids.shape == (1, 1) and len(batch.scored) == 0 and batch.num_examples == 0
        assert batch.num_tokens == 0


def test_examples_of_one_micro_batch_have_equally_many_branches():
    with pytest.raises(ValueError, match="equally many branches"):
        pack([PAIRS[0], Example(ids(1), (branch(2),), {"margin": 0.0})], [0, 1], TOTALS)


def test_values_must_be_the_same_for_all():
    with pytest.raises(ValueError, match="same values"):
        pack([PAIRS[0], Example(ids(1), (branch(2), branch(3)))], [0, 1], TOTALS)


def test_moving_keeps_everything_but_the_place():
    batch = pack(PAIRS, [0, 1], TOTALS)
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.scored.weights.is_meta and moved.values["margin"].is_meta
    assert moved.segments == batch.segments and moved.totals == batch.totals


@st.composite
def forests(draw):
    branches = draw(st.integers(1, 3))
    examples = []
    for _ in range(draw(st.integers(1, 4))):
        prefix = torch.arange(draw(st.integers(0, 4)))
        sizes = [draw(st.integers(1, 5)) for _ in range(branches)]
        weights = [torch.tensor([draw(st.sampled_from([0.0, 1.0, 2.5])) for _ in range(n)]) for n in sizes]
        examples.append(
            Example(prefix, tuple(Branch(torch.arange(10, 10 + n), w) for n, w in zip(sizes, weights, strict=True)))
        )
    return examples


@settings(max_examples=60)
@given(forests())
def test_every_layout_scores_the_same_tokens_from_the_token_before(examples):
    want = []
    for e in examples:
        for b in e.branches:
            whole = torch.cat([e.prefix_ids, b.input_ids]).tolist()
            start = len(e.prefix_ids)
            want += [
                (whole[start + t], whole[start + t - 1], float(b.weights[t]))
                for t in range(len(b.input_ids))
                if b.weights[t] > 0 and start + t > 0
            ]
    for batch in (
        pack(examples, range(len(examples)), TOTALS),
        pad(examples, range(len(examples)), TOTALS),
        pad(examples, range(len(examples)), TOTALS, padding_side="left"),
    ):
        flat, s = batch.input_ids.flatten(), batch.scored
        got = list(zip(s.targets.tolist(), flat[s.sources].tolist(), s.weights.tolist(), strict=True))
        assert got == want
        assert float(s.weights.sum()) == pytest.approx(sum(e.trained_weight for e in examples))
        last = [int(b.input_ids[-1]) for e in examples for b in e.branches]
        assert flat[batch.ends].tolist() == last
        assert batch.num_tokens == sum(map(len, examples))
