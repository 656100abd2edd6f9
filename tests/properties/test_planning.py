"""Every example once an epoch, in the same optimizer steps however the work of a step is shared."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.pretrain import BlockExamples
from lit_align.batch import PlannedLoader, epoch_order

quick = settings(max_examples=100)
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)
sizes = st.one_of(
    st.builds(lambda n: {"batch_size": n}, st.integers(1, 12)),
    st.builds(lambda n: {"max_tokens": n}, st.integers(1, 90)),
)
parts = st.tuples(st.integers(1, 4), st.integers(1, 3))


def collate(examples, plan):
    return examples, plan.totals


def steps(lengths, size, ranks, micro_batches, epochs, **options):
    """For each epoch, the steps as (examples of all ranks and micro-batches, sorted; totals)."""
    loaders = [
        PlannedLoader(
            range(len(lengths)),
            collate,
            lengths=np.array(lengths),
            trained_weights=np.array(lengths) / 2,
            rank=rank,
            world_size=ranks,
            micro_batches=micro_batches,
            seed=5,
            **size,
            **options,
        )
        for rank in range(ranks)
    ]
    result = []
    for _ in range(epochs):
        assert len({len(loader) for loader in loaders}) == 1
        batches = [list(loader) for loader in loaders]
        assert all(len(rank) % micro_batches == 0 for rank in batches)
        epoch = []
        for at in range(0, len(batches[0]), micro_batches):
            micro = [batch for rank in batches for batch in rank[at : at + micro_batches]]
            assert len({totals for _, totals in micro}) == 1
            epoch.append((sorted(i for members, _ in micro for i in members), micro[0][1]))
        result.append(epoch)
    return result


@quick
@given(lengths, sizes, parts, st.booleans())
def test_every_example_is_seen_exactly_once_an_epoch(lengths, size, shape, shuffle):
    for epoch in steps(lengths, size, *shape, epochs=2, shuffle=shuffle):
        assert sorted(i for step, _ in epoch for i in step) == list(range(len(lengths)))
        for step, totals in epoch:
            assert step and totals.examples == len(step)
            assert totals.tokens == pytest.approx(sum(lengths[i] for i in step) / 2, rel=1e-12)
            if "max_tokens" in size:
                assert len(step) == 1 or sum(lengths[i] for i in step) <= size["max_tokens"]


@quick
@given(lengths, sizes, parts, st.booleans(), st.data())
def test_steps_hold_the_same_examples_however_they_are_shared(lengths, size, shape, shuffle, data):
    weights = st.sampled_from([0.5, 1.0, 1.5, 2.0])
    copies = data.draw(st.none() | st.lists(weights, min_size=len(lengths), max_size=len(lengths)).map(np.array))
    options = {"epochs": 2, "shuffle": shuffle, "copies": copies}
    if copies is not None and epoch_order(len(lengths), shuffle=False, seed=5, epoch=0, copies=copies).size == 0:
        return
    assert steps(lengths, size, *shape, **options) == steps(lengths, size, 1, 1, **options)


@quick
@given(lengths, sizes, parts, parts, st.data())
def test_a_run_that_goes_on_elsewhere_sees_exactly_what_is_left(lengths, size, before, after, data):
    def loaders(shape):
        ranks, micro_batches = shape
        make = {"lengths": np.array(lengths), "trained_weights": np.ones(len(lengths)), "micro_batches": micro_batches}
        return [
            PlannedLoader(range(len(lengths)), collate, rank=r, world_size=ranks, **make, **size) for r in range(ranks)
        ]

    begun, rest = loaders(before), loaders(after)
    done = data.draw(st.integers(0, len(begun[0]) // before[1] - 1))
    seen = Counter()
    for loader in begun:
        for _, (members, _) in zip(range(done * before[1]), loader, strict=False):
            seen.update(members)
    for loader in rest:
        loader.load_state_dict(begun[0].state_dict())
        for members, _ in loader:
            seen.update(members)
    assert seen == Counter(range(len(lengths)))


@quick
@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=4),
    st.integers(0, 5),
    st.booleans(),
)
def test_weights_say_how_often_examples_are_seen(groups, epoch, shuffle):
    copies = np.concatenate([np.full(count, weight) for count, weight in groups])
    counts = np.bincount(
        epoch_order(len(copies), shuffle=shuffle, seed=1, epoch=epoch, copies=copies), minlength=len(copies)
    )
    for weight in set(copies):
        seen = counts[copies == weight]
        assert abs(seen.sum() - weight * len(seen)) <= 0.5 + 1e-9
        assert set(seen) <= {int(weight), int(np.ceil(weight))}


# --- blocks of pre-training ------------------------------------------------------------------------------------------

END = -1


def rows_of(documents, weights):
    """Rows as they are stored: the ids of each document with its end; their sources have weights of their own."""
    ids = [np.array([*document, END], dtype=np.int32) for document in documents]
    column = type("Column", (list,), {"lengths": np.array([len(row) for row in ids])})(ids)
    copies = None if weights is None else np.array(weights, dtype=np.float64)
    return SimpleNamespace(ragged=lambda name: column, copies=lambda chosen: None if copies is None else copies[chosen])


def tokens(examples):
    return [example.branches[0].input_ids.tolist() for example in examples]


documents = st.lists(st.lists(st.integers(0, 99), max_size=25), min_size=1, max_size=8)


@quick
@given(documents, st.integers(2, 12))
def test_the_blocks_end_to_end_are_the_corpus(documents, block_size):
    examples = BlockExamples(rows_of(documents, None), np.arange(len(documents)), block_size)
    corpus = [token for document in documents for token in [*document, END]][:-1]
    if len(corpus) % block_size == 1:  # nothing could predict it
        corpus = corpus[:-1]
    blocks = tokens(examples[i] for i in range(len(examples)))
    assert [token for block in blocks for token in block] == corpus
    assert all(len(block) == block_size for block in blocks[:-1]) and all(len(block) > 1 for block in blocks)
    assert examples.lengths.tolist() == [len(block) for block in blocks] and examples.copies is None
    cut = examples[1:]
    assert tokens(cut[i] for i in range(len(cut))) == blocks[1:]


@quick
@given(documents, st.integers(2, 12), st.data())
def test_no_block_holds_text_of_two_weights(documents, block_size, data):
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(documents), max_size=len(documents)))
    number = np.arange(len(documents))
    marked = [[1000 * i + token for token in document] for i, document in zip(number, documents, strict=True)]
    examples = BlockExamples(rows_of(marked, weights), number, block_size)
    blocks = tokens(examples[i] for i in range(len(examples)))
    for block, copies in zip(blocks, examples.copies, strict=True):
        assert {weights[token // 1000] for token in block if token != END} <= {copies}
    for weight in set(weights):
        alone = [i for i in number if weights[i] == weight]
        mine = [block for block, copies in zip(blocks, examples.copies, strict=True) if copies == weight]
        single = BlockExamples(rows_of([marked[i] for i in alone], None), np.arange(len(alone)), block_size)
        assert mine == tokens(single[i] for i in range(len(single)))
