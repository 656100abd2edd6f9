"""Attention over a packed row the slow way: float64, one dense mask over the whole pack; and slow kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import Branch, Example, MicroBatch, StepTotals, pack


def packed_row(*examples: tuple[int, ...]) -> MicroBatch:
    """A packed micro-batch of (prefix, branch, branch, ...) sizes."""

    def ids(n: int) -> Tensor:
        return torch.ones(n, dtype=torch.long)

    items = [Example(ids(prefix), tuple(Branch(ids(n), torch.ones(n)) for n in sizes)) for prefix, *sizes in examples]
    return pack(items, range(len(items)), StepTotals(1.0, 1.0))


def visible(batch: MicroBatch, window: int | None) -> Tensor:
    """True = may attend, [T, T], token by token from segments and positions."""
    length = batch.input_ids.shape[1]
    positions = batch.position_ids[0].tolist()
    mask = torch.zeros(length, length, dtype=torch.bool)
    for segment in batch.segments:
        for query in range(segment.start, segment.stop):
            for key in [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, query + 1)]:
                mask[query, key] = window is None or positions[query] - positions[key] < window
    return mask


def dense(query, key, value, mask, scale, softcap=None) -> Tensor:
    """[1, T, query heads, D] in float64 of [1, heads, T, D]."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(group, 1),
        value.double().repeat_interleave(group, 1),
    )
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def _bounds(cu_q, cu_k, window):
    """For each span: its queries, its keys, True = may attend."""
    for i in range(len(cu_q) - 1):
        q, k = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        queries, keys = q.stop - q.start, k.stop - k.start
        back = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        mask = torch.ones_like(back, dtype=torch.bool)
        mask &= back <= window[0] if window[0] >= 0 else True
        mask &= back >= -window[1] if window[1] >= 0 else True
        yield q, k, mask


def _slow(query, key, value, cu_q, cu_k, max_q, max_k, scale, window) -> Tensor:
    sizes_q, sizes_k = cu_q.diff(), cu_k.diff()
    assert cu_q.dtype == cu_k.dtype == torch.int32 and isinstance(max_q, int) and isinstance(max_k, int)
    assert (int(sizes_q.max()), int(sizes_k.max())) == (max_q, max_k)
    assert query.shape[0] == int(cu_q[-1]) and key.shape[0] == value.shape[0] == int(cu_k[-1])
    parts = []
    for q, k, mask in _bounds(cu_q, cu_k, window):
        heads = (tensor[None].transpose(1, 2) for tensor in (query[q], key[k], value[k]))
        parts.append(dense(*heads, mask, scale)[0])
    return torch.cat(parts).to(query.dtype)


def newer_form(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """The arguments of torch 2.13, without what only the kernel itself can give (log-sum-exp)."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _slow(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def older_form(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """A window, but no groups of query heads."""
    assert query.shape[1] == key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _slow(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def oldest_form(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """Neither window nor scale."""
    assert query.shape[1] == key.shape[1]
    window = (-1, 0) if is_causal else (-1, -1)
    return _slow(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[-1] ** -0.5, window)


def register_cpu_kernels() -> None:
    """Gives the operators behind torch's own `varlen_attn` slow kernels for the CPU."""
    from torch.nn.attention import varlen

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(
        query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest, **more
    ):
        assert is_causal == (list(window_size) == [-1, 0])
        output = _slow(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size)
        group = query.shape[1] // key.shape[1]
        lse = torch.empty(query.shape[1], query.shape[0])
        for q, k, mask in _bounds(cu_q, cu_k, window_size):
            scores = (
                torch.einsum("qhd,khd->hqk", query[q].double(), key[k].double().repeat_interleave(group, 1)) * scale
            )
            lse[:, q] = scores.masked_fill(~mask, -torch.inf).logsumexp(-1).float()
        return output, lse, torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        cu_q,
        cu_k,
        max_q,
        max_k,
        is_causal,
        rng_state,
        scale=None,
        window_size=None,
    ):
        assert is_causal == (list(window_size) == [-1, 0]) and rng_state.dtype == torch.uint64
        assert lse.shape == (query.shape[1], query.shape[0]) and grad_out.is_contiguous()
        group = query.shape[1] // key.shape[1]
        into_q, into_k, into_v = (torch.zeros_like(tensor, dtype=torch.float64) for tensor in (query, key, value))
        for q, k, mask in _bounds(cu_q, cu_k, window_size):
            queries, upstream, output = (t[q].double() for t in (query, grad_out, out))
            keys, values = (t[k].double().repeat_interleave(group, 1) for t in (key, value))
            scores = (torch.einsum("qhd,khd->hqk", queries, keys) * scale).masked_fill(~mask, -torch.inf)
            weights = scores.softmax(-1)
            assert torch.allclose((scores - lse[:, q, None]).exp(), weights, rtol=1e-2, atol=1e-2)
            slopes = torch.einsum("qhd,khd->hqk", upstream, values) - (upstream * output).sum(-1).T[..., None]
            slopes = weights * slopes * scale
            into_q[q] = torch.einsum("hqk,khd->qhd", slopes, keys)
            into_k[k] = torch.einsum("hqk,qhd->khd", slopes, queries).unflatten(1, (-1, group)).sum(2)
            into_v[k] = torch.einsum("hqk,qhd->khd", weights, upstream).unflatten(1, (-1, group)).sum(2)
        return into_q.to(query.dtype), into_k.to(key.dtype), into_v.to(value.dtype)
