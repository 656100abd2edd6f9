"""Attention over a packed row: each segment sees itself and its prefix, nothing else.

Registered with transformers under the name "packed". Without `segments` (padded batches, `generate`) it is
plain SDPA, so one setting serves training and sampling. There is never a dense mask over the pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_align.batch import Segment

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Sequence[Segment] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form that transformers calls.

    Args:
        module: The attention layer.
        query: [rows, query heads, T, D]; rows = 1 when `segments` is given.
        key: [rows, key heads, T, D]; query heads is a multiple of key heads.
        value: Like `key`.
        attention_mask: What transformers made of the padded batch's mask; not looked at when packed.
        segments: Who attends to whom in the packed row; None = padded batch or generation.
        dropout: Of the attention weights.
        scaling: Of the scores; None = 1 / sqrt(D).
        sliding_window: Number of keys, the query's own included, that a query may look back on.
        **kwargs: Passed on to SDPA when there are no segments.

    Returns:
        The output [rows, T, query heads, D], and None in place of the weights.
    """
    if segments is None:
        kwargs |= {"sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None:
        raise ValueError("packed attention has no soft-capping of scores; use the padded layout for this model")
    parts = [_segment(query, key, value, s, dropout, scaling, sliding_window) for s in segments]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment: Segment,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    own = slice(segment.start, segment.stop)
    q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
    prefix = segment.prefix_stop - segment.prefix_start
    if prefix:
        shared = slice(segment.prefix_start, segment.prefix_stop)
        k, v = torch.cat([key[:, :, shared], k], dim=2), torch.cat([value[:, :, shared], v], dim=2)
    mask = _mask(q.shape[2], prefix, sliding_window, q.device)
    return scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _mask(size: int, prefix: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """True = may attend, [size, prefix + size]; None where plain causal attention says the same."""
    windowed = sliding_window is not None and sliding_window < prefix + size
    if not prefix and not windowed:
        return None
    back = torch.arange(size, device=device)[:, None] + prefix - torch.arange(prefix + size, device=device)
    return (back >= 0) & (back < sliding_window) if windowed else back >= 0


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
