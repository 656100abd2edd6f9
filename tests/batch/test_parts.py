"""Parts of a micro-batch: together the whole, each with what belongs to it and nothing else."""

import pytest
import torch

from lit_align.batch import Branch, Example, StepTotals, example_parts, pack, pad, token_parts

SIZES = [(5, 9), (1, 3), (14, 2), (6, 6), (1, 1)]


def micro_batch(layout=pack):
    g = torch.Generator().manual_seed(0)

    def branch(size: int) -> Branch:
        ids = torch.randint(1, 90, (size,), generator=g)
        return Branch(ids, (torch.rand(size, generator=g) < 0.7).float(), {"old": torch.randn(size, generator=g)})

    examples = [
        Example(torch.randint(1, 90, (2,), generator=g), (branch(a), branch(b)), {"margin": float(i)})
        for i, (a, b) in enumerate(SIZES)
    ]
    return pack(examples, range(10, 15), StepTotals(3.0, 5.0)) if layout is pack else pad(
        examples, range(10, 15), StepTotals(3.0, 5.0)
    )  # fmt: skip


@pytest.mark.parametrize("layout", [pack, pad])
@pytest.mark.parametrize("limit", [1, 4, 7, 100])
@pytest.mark.parametrize("cut", [token_parts, example_parts])
def test_parts_are_the_whole_in_order(cut, limit, layout):
    batch = micro_batch(layout)
    parts = cut(batch, limit)
    rows = torch.cat([torch.arange(len(batch.scored))[rows] for rows, _ in parts])
    assert rows.tolist() == list(range(len(batch.scored)))
    for name in ("targets", "sources", "weights"):
        joined = torch.cat([getattr(part.scored, name) for _, part in parts])
        assert torch.equal(joined, getattr(batch.scored, name))
    assert torch.equal(torch.cat([part.tokens["old"] for _, part in parts]), batch.tokens["old"])


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_token_parts_are_near_equal_and_within_the_limit(limit):
    sizes = [len(part.scored) for _, part in token_parts(micro_batch(), limit)]
    assert max(sizes) <= limit and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-sum(sizes) // limit)


@pytest.mark.parametrize("limit", [1, 10, 13, 100])
def test_example_parts_hold_whole_examples_numbered_from_0(limit):
    batch = micro_batch()
    parts = [part for _, part in example_parts(batch, limit)]
    assert torch.cat([part.indices for part in parts]).tolist() == batch.indices.tolist()
    assert torch.cat([part.values["margin"] for part in parts]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert torch.equal(torch.cat([part.ends for part in parts]), batch.ends)
    for part in parts:
        assert part.groups.tolist() == [[2 * i, 2 * i + 1] for i in range(part.num_examples)]
        counts = torch.bincount(part.scored.sequences, minlength=part.num_sequences)
        assert counts.tolist() == list(part.scored_counts)
        assert len(part.scored) <= limit or part.num_examples == 1
        assert part.totals == batch.totals
    assert sum((part.scored_counts for part in parts), ()) == batch.scored_counts


def test_an_empty_micro_batch_has_no_parts():
    batch = pack([], [], StepTotals(1.0, 1.0))
    assert token_parts(batch, 5) == example_parts(batch, 5) == []
