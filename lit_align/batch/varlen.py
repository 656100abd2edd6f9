"""Where the queries and keys of a packed row lie, worked out on the host so that no layer reads from the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lit_align.batch.types import KeyGather, Segment, Varlen


def varlen(segments: Sequence[Segment]) -> Varlen:
    """The bounds that an attention with variable lengths needs.

    Args:
        segments: Of one packed row, in its order; all prefixes with equally many branches.

    Returns:
        Index tensors on the CPU, and plain ints.
    """
    spans = merged(segments)
    queries = [span.stop - span.start for span in spans]
    keys = [size + span.prefix_stop - span.prefix_start for size, span in zip(queries, spans, strict=True)]
    return Varlen(
        spans=spans,
        cu_seqlens_q=_bounds(queries),
        cu_seqlens_k=_bounds(keys),
        max_q=max(queries),
        max_k=max(keys),
        gather=_gather(spans) if keys != queries else None,
    )


def merged(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Joins each prefix with the branch that follows it: together they are one plain causal sequence."""
    spans: list[Segment] = []
    for segment in segments:
        last = spans[-1] if spans else None
        follows = last is not None and segment.start == last.stop
        if follows and segment.prefix_stop and (segment.prefix_start, segment.prefix_stop) == (last.start, last.stop):
            spans[-1] = Segment(last.start, segment.stop)
        else:
            spans.append(segment)
    return tuple(spans)


def _bounds(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def _gather(spans: tuple[Segment, ...]) -> KeyGather:
    parts: list[Tensor] = []
    own: list[Tensor] = []
    copies: dict[tuple[int, int], list[Tensor]] = {}
    at = 0
    for span in spans:
        prefix, size = span.prefix_stop - span.prefix_start, span.stop - span.start
        if prefix:
            parts.append(torch.arange(span.prefix_start, span.prefix_stop))
            copies.setdefault((span.prefix_start, span.prefix_stop), []).append(torch.arange(at, at + prefix))
        parts.append(torch.arange(span.start, span.stop))
        own.append(torch.arange(at + prefix, at + prefix + size))
        at += prefix + size
    if len({len(places) for places in copies.values()}) != 1:
        raise ValueError("all prefixes of a packed row need equally many branches")
    return KeyGather(
        keys=torch.cat(parts),
        own=torch.cat(own),
        prefix=torch.cat([torch.arange(*bounds) for bounds in copies]),
        copies=torch.cat([torch.stack(places, 1) for places in copies.values()]),
    )
