"""How the examples of a micro-batch are laid out: end to end in one row, or as a padded rectangle.

Both layouts carry the same table of scored tokens in the same order, so a stage cannot tell them apart. The
packed row is the default: it holds no padding and each prefix once. The padded rectangle repeats the prefix for
every branch; it serves architectures whose attention cannot be swapped, and as the reference that the packed
layout is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lit_align.batch.types import Branch, Example, MicroBatch, Scored, Segment, StepTotals

LayOut = Callable[[Sequence[Example], Sequence[int], StepTotals], MicroBatch]
"""Makes a micro-batch from examples, their indices and the step's totals, as `pack` and `pad` do."""


def pack(examples: Sequence[Example], indices: Sequence[int], totals: StepTotals) -> MicroBatch:
    """Lays all examples end to end in one row; branches share their prefix.

    Args:
        examples: B examples with equally many branches; B may be 0 (a rank with nothing to do in this
            micro-batch still has to take part in the step: it gets one unscored token).
        indices: Index of each example in its dataset.
        totals: Denominators of the optimizer step that the micro-batch belongs to.

    Returns:
        A micro-batch with `segments` set and `attention_mask` None.
    """
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    table = _Table()
    at = 0
    for example in examples:
        prefix = len(example.prefix_ids)
        prefix_start = at
        if prefix:
            ids.append(example.prefix_ids)
            positions.append(torch.arange(prefix))
            segments.append(Segment(at, at + prefix))
            at += prefix
        for branch in example.branches:
            size = len(branch.input_ids)
            ids.append(branch.input_ids)
            positions.append(torch.arange(prefix, prefix + size))
            segments.append(Segment(at, at + size, prefix_start, prefix_start + prefix))
            table.add(branch, at, prefix_start + prefix - 1 if prefix else None)
            at += size
    return MicroBatch(
        input_ids=_row(ids),
        position_ids=_row(positions),
        attention_mask=None,
        segments=tuple(segments) or (Segment(0, 1),),
        num_tokens=at,
        **table.fields(examples, indices, totals),
    )


def pad(
    examples: Sequence[Example],
    indices: Sequence[int],
    totals: StepTotals,
    pad_token_id: int = 0,
    padding_side: str = "right",
) -> MicroBatch:
    """Lays each branch, with its prefix before it, in a row of its own, padded to the longest.

    Args:
        examples: B examples with equally many branches; B may be 0.
        indices: Index of each example in its dataset.
        totals: Denominators of the optimizer step that the micro-batch belongs to.
        pad_token_id: Fills the rectangle; never looked at again, so it may be any id.
        padding_side: "right" or "left".

    Returns:
        A micro-batch with `attention_mask` set and `segments` None.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {padding_side!r}")
    rows = [(example, branch) for example in examples for branch in example.branches]
    sizes = [len(example.prefix_ids) + len(branch.input_ids) for example, branch in rows]
    columns = max(sizes, default=1)
    shape = (max(len(rows), 1), columns)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # An empty micro-batch keeps one visible token: a row with nothing to attend to would be NaN.
    attention_mask = torch.zeros(shape, dtype=torch.long) if rows else torch.ones(shape, dtype=torch.long)
    table = _Table()
    for row, ((example, branch), size) in enumerate(zip(rows, sizes, strict=True)):
        first = 0 if padding_side == "right" else columns - size
        here = slice(first, first + size)
        input_ids[row, here] = torch.cat([example.prefix_ids, branch.input_ids])
        position_ids[row, here] = torch.arange(size)
        attention_mask[row, here] = 1
        prefix = len(example.prefix_ids)
        start = row * columns + first + prefix
        table.add(branch, start, start - 1 if prefix else None)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        segments=None,
        num_tokens=sum(len(example) for example in examples),
        **table.fields(examples, indices, totals),
    )


class _Table:
    """Collects the scored tokens of one branch after the other."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.tokens: list[dict[str, Tensor]] = []
        self.ends: list[int] = []

    def add(self, branch: Branch, start: int, before: int | None) -> None:
        """Adds a branch whose tokens lie at `start`; `before` = flat position of its prefix's last token."""
        size = len(branch.input_ids)
        sources = torch.arange(start - 1, start + size - 1)
        scored = branch.weights > 0
        if before is None:
            scored[0] = False  # nothing stands before the very first token, so nothing predicts it
        else:
            sources[0] = before
        self.targets.append(branch.input_ids[scored])
        self.sources.append(sources[scored])
        self.weights.append(branch.weights[scored])
        self.tokens.append({name: values[scored] for name, values in branch.tokens.items()})
        self.ends.append(start + size - 1)

    def fields(self, examples: Sequence[Example], indices: Sequence[int], totals: StepTotals) -> dict:
        """The fields of a micro-batch that do not depend on the layout."""
        counts = tuple(len(t) for t in self.targets)
        repeats = torch.tensor(counts, dtype=torch.long)
        return {
            "scored": Scored(
                targets=_cat(self.targets, torch.long),
                sources=_cat(self.sources, torch.long),
                sequences=torch.repeat_interleave(torch.arange(len(counts)), repeats),
                weights=_cat(self.weights, torch.float32),
            ),
            "ends": torch.tensor(self.ends, dtype=torch.long),
            "groups": _groups(examples),
            "totals": totals,
            "values": _stack([example.values for example in examples]),
            "tokens": {k: _cat([t[k] for t in self.tokens], torch.float32) for k in _same_keys(self.tokens)},
            "indices": torch.as_tensor(list(indices), dtype=torch.long),
            "scored_counts": counts,
        }


def _groups(examples: Sequence[Example]) -> Tensor:
    counts = [len(example.branches) for example in examples]
    if not counts:
        return torch.zeros((0, 1), dtype=torch.long)
    if any(a != b for a, b in pairwise(counts)):
        raise ValueError(f"examples of one micro-batch need equally many branches, got {counts}")
    return torch.arange(sum(counts)).view(len(counts), counts[0])


def _same_keys(rows: Sequence) -> list[str]:
    keys = list(rows[0]) if rows else []
    for row in rows:
        if list(row) != keys:
            raise ValueError(f"examples of one micro-batch need the same values, got {keys} and {list(row)}")
    return keys


def _stack(rows: Sequence) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows], dtype=torch.float32) for key in _same_keys(rows)}


def _row(parts: list[Tensor]) -> Tensor:
    return _cat(parts, torch.long)[None] if parts else torch.zeros((1, 1), dtype=torch.long)


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype)
