"""Attention span by span, as blocks of plain matrix products: what a CPU is fastest at, and what can be soft-capped.

Query heads that share a key head make one taller matrix; keys that no query of a block may see are never multiplied;
scores are computed again in backward instead of kept. Low-precision inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align.batch import Segment

BLOCK = 64
"""Queries of a block on a CPU: fewer spend more time between products, more spend products above the diagonal."""
GPU_BLOCK = 512
"""On anything else, where every product is a launch."""


class Scores(NamedTuple):
    """How scores come from queries and keys.

    Attributes:
        scale: They are multiplied by it.
        window: Keys, the query's own included, that a query may look back on; None = all.
        softcap: They become tanh(score / softcap) * softcap; None = they stay.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class Block(NamedTuple):
    """Queries `start:stop` of the row against keys `first:last` of their span; query 0 is key `first + offset`."""

    start: int
    stop: int
    first: int
    last: int
    offset: int


def span_attention(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Segment], scores: Scores) -> Tensor:
    """Attention over a packed row; no dropout.

    Args:
        query: [1, query heads, T, D].
        key: [1, key heads, T, D]; query heads is a multiple of key heads.
        value: [1, key heads, T, D of values].
        spans: They cover the row in its order; each sees itself causally, and its prefix.
        scores: Scale, window, cap.

    Returns:
        [1, T, query heads, D of values], in the query's dtype.
    """
    return _SpanAttention.apply(query, key, value, tuple(spans), scores)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[Segment, ...], scores: Scores
    ) -> Tensor:
        q, k, v = _grouped(query, key), _wide(key[0]), _wide(value[0])
        output = v.new_empty(1, query.shape[2], query.shape[1], v.shape[2])
        rows = _grouped(output.transpose(1, 2), key)
        with torch.autocast(query.device.type, enabled=False):
            for span in spans:
                keys, values = _keys(k, span), _keys(v, span)
                for block in _blocks(span, scores.window, k.device):
                    seen = slice(block.first, block.last)
                    weights, _ = _weights(_queries(q, block), keys[:, seen], block, scores)
                    _put(rows, block, torch.bmm(weights, values[:, seen]))
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output)
        ctx.spans, ctx.scores = spans, scores
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        q, k, v = _grouped(query, key), _wide(key[0]), _wide(value[0])
        gradient = _wide(gradient)
        inner = _grouped((gradient * output).sum(-1, keepdim=True).transpose(1, 2), key)
        wanted = _grouped(gradient.transpose(1, 2), key)
        into_q, into_k, into_v = (_zeros(tensor, k.dtype) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            for span in ctx.spans:
                keys, values = _keys(k, span), _keys(v, span)
                found = _span_backward((q, keys, values), (wanted, inner), span, ctx.scores, _grouped(into_q, key))
                for into, part in zip((into_k, into_v), found, strict=True):
                    _add(into[0], part, span)
        return into_q.to(query.dtype), into_k.to(key.dtype), into_v.to(value.dtype), None, None


def _span_backward(
    inputs: tuple[Tensor, Tensor, Tensor], known: tuple[Tensor, Tensor], span: Segment, scores: Scores, into_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Puts the gradient of the span's queries in place; returns that of its keys and of its values."""
    (q, keys, values), (wanted, inner) = inputs, known
    into_keys, into_values = torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(span, scores.window, keys.device):
        seen = slice(block.first, block.last)
        queries, upstream = _queries(q, block), _queries(wanted, block)
        weights, slope = _weights(queries, keys[:, seen], block, scores)
        into_values[:, seen].baddbmm_(weights.mT, upstream)
        into_scores = torch.bmm(upstream, values[:, seen].mT).sub_(_queries(inner, block)).mul_(weights)
        if slope is not None:
            into_scores.mul_(slope)
        into_keys[:, seen].baddbmm_(into_scores.mT, queries, alpha=scores.scale)
        _put(into_q, block, _product(into_scores, keys[:, seen], scores.scale))
    return into_keys, into_values


def _weights(queries: Tensor, keys: Tensor, block: Block, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """Weights of a block, [key heads, group * queries, keys], and the derivative of the cap where there is one."""
    found, slope = _product(queries, keys.mT, scores.scale), None
    if scores.softcap is not None:
        capped = found.div_(scores.softcap).tanh_()
        found, slope = capped * scores.softcap, 1 - capped.square()
    size, columns, offset = block.stop - block.start, keys.shape[1], block.offset
    grid = found.view(len(found), -1, size, columns)
    if scores.window is None:  # all of the block see what stands before it
        grid, offset = grid[..., columns - size :], 0
    grid.add_(_hidden(size, offset, scores.window, found.dtype, found.device))
    return torch.softmax(found, -1), slope


def _hidden(size: int, offset: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf = may not attend, else 0, [size, offset + size]; query 0 is column `offset`."""
    reach = window or 0
    return _band(window, dtype, device)[:size, reach - offset : reach + size]


@lru_cache(maxsize=8)
def _band(window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of which every block's mask is a part, however long its span: one for a device, a few megabytes at most."""
    size, reach = _block_size(device), window or 0
    with torch.inference_mode(False):
        back = torch.arange(size, device=device)[:, None] + reach - torch.arange(reach + size, device=device)
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        return torch.zeros_like(back, dtype=dtype).masked_fill(hidden, -torch.inf)


def _block_size(device: torch.device) -> int:
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def _blocks(span: Segment, window: int | None, device: torch.device) -> Iterator[Block]:
    before = span.prefix_stop - span.prefix_start - span.start
    size = _block_size(device)
    for start in range(span.start, span.stop, size):
        stop = min(start + size, span.stop)
        first = 0 if window is None else max(0, before + start - window + 1)
        yield Block(start, stop, first, before + stop, before + start - first)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """[1, query heads, T, D] as [key heads, query heads of each, T, D]; shares memory unless it is widened."""
    return _wide(tensor[0]).unflatten(0, (key.shape[1], -1))


def _queries(tensor: Tensor, block: Block) -> Tensor:
    """A block's rows, those of the heads of a group below each other: [key heads, group * queries, D]."""
    return tensor[:, :, block.start : block.stop].flatten(1, 2)


def _product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(one.new_zeros(()), one, other, beta=0, alpha=scale)


def _put(tensor: Tensor, block: Block, rows: Tensor) -> None:
    place = tensor[:, :, block.start : block.stop]
    place.copy_(rows.view(place.shape))


def _keys(tensor: Tensor, span: Segment) -> Tensor:
    """Keys or values that a span sees, [key heads, keys, D]."""
    own = tensor[:, span.start : span.stop]
    if span.prefix_start == span.prefix_stop:
        return own
    return torch.cat([tensor[:, span.prefix_start : span.prefix_stop], own], dim=1)


def _add(into: Tensor, part: Tensor, span: Segment) -> None:
    prefix = span.prefix_stop - span.prefix_start
    into[:, span.prefix_start : span.prefix_stop] += part[:, :prefix]
    into[:, span.start : span.stop] += part[:, prefix:]


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the same shape [1, heads, T, D], in memory as [1, T, heads, D]: what the projections work on."""
    return torch.zeros_like(like.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)
