"""Parts of a micro-batch: what the head works on at a time, so that its memory does not grow with the micro-batch.

A part is a micro-batch whose scored tokens are a run of the whole's, with everything that belongs to them. Tensors are
views; where the cuts are is known on the host, so nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

from lit_align.batch.types import MicroBatch, Scored


def token_parts(batch: MicroBatch, max_tokens: int) -> list[tuple[slice, MicroBatch]]:
    """Near-equal runs of scored tokens, wherever the cuts fall: for losses that are a sum over tokens.

    Args:
        batch: With N scored tokens.
        max_tokens: Scored tokens of a part, at most.

    Returns:
        For each part its rows among the N, and the micro-batch with `scored` and `tokens` cut down to them; its other
        fields are those of the whole. No part where nothing is scored.
    """
    total = len(batch.scored)
    number = -(-total // max_tokens)
    bounds = [total * part // number for part in range(number + 1)] if number else []
    rows = [slice(start, stop) for start, stop in pairwise(bounds)]
    return [(part, _with_rows(batch, part)) for part in rows]


def example_parts(batch: MicroBatch, max_tokens: int) -> list[tuple[slice, MicroBatch]]:
    """Runs of whole examples: for losses that are a sum over examples.

    Args:
        batch: With N scored tokens of B examples.
        max_tokens: Scored tokens of a part, at most; an example that has more of them is a part of its own.

    Returns:
        For each part its rows among the N, and the micro-batch of its examples alone, sequences numbered from 0;
        only the fields that say where tokens lie in the row (`input_ids`, `position_ids`, `segments`, `num_tokens`)
        are those of the whole. No part where there is no example.
    """
    return [_with_examples(batch, first, last) for first, last in _runs(_scored_per_example(batch), max_tokens)]


def _scored_per_example(batch: MicroBatch) -> list[int]:
    n = batch.groups.shape[1]
    return [sum(batch.scored_counts[i : i + n]) for i in range(0, len(batch.scored_counts), n)]


def _runs(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Bounds of runs of consecutive items whose sizes add up to at most `limit`, each of at least one item."""
    first = load = 0
    for item, size in enumerate(sizes):
        if item > first and load + size > limit:
            yield first, item
            first, load = item, 0
        load += size
    if sizes:
        yield first, len(sizes)


def _with_examples(batch: MicroBatch, first: int, last: int) -> tuple[slice, MicroBatch]:
    n = batch.groups.shape[1]
    sequences = slice(first * n, last * n)
    before = list(accumulate(batch.scored_counts, initial=0))
    rows = slice(before[sequences.start], before[sequences.stop])
    part = _with_rows(batch, rows)
    return rows, replace(
        part,
        scored=replace(part.scored, sequences=part.scored.sequences - sequences.start),
        ends=batch.ends[sequences],
        groups=batch.groups[first:last] - sequences.start,
        values={name: values[first:last] for name, values in batch.values.items()},
        indices=batch.indices[first:last],
        scored_counts=batch.scored_counts[sequences],
    )


def _with_rows(batch: MicroBatch, rows: slice) -> MicroBatch:
    table = batch.scored
    scored = Scored(table.targets[rows], table.sources[rows], table.sequences[rows], table.weights[rows])
    return replace(batch, scored=scored, tokens={name: values[rows] for name, values in batch.tokens.items()})
