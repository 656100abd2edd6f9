"""Attention span by span through torch's own kernels: for devices and settings that nothing faster here serves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_align.batch import Segment

MASK_STEP = 512


def span_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[Segment],
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over a packed row, with dropout of the weights if wanted.

    Args:
        query: [1, query heads, T, D].
        key: [1, key heads, T, D]; query heads is a multiple of key heads.
        value: [1, key heads, T, D of values].
        spans: They cover the row in its order; each sees itself causally, and its prefix.
        scale: Of the scores.
        window: Keys, the query's own included, that a query may look back on; None = all.
        dropout: Probability that a weight becomes 0.

    Returns:
        [1, T, query heads, D of values].
    """
    # One split makes one gradient tensor for the row; a slice for each span would fill a whole row of zeros each.
    sizes = [span.stop - span.start for span in spans]
    parts = []
    rows = zip(spans, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    for span, q, k, v in rows:
        prefix = span.prefix_stop - span.prefix_start
        if prefix:
            shared = slice(span.prefix_start, span.prefix_stop)
            k, v = torch.cat([key[:, :, shared], k], 2), torch.cat([value[:, :, shared], v], 2)
        mask = _mask(q.shape[2], prefix, window, q.device)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def _mask(size: int, prefix: int, window: int | None, device: torch.device) -> Tensor | None:
    """True = may attend, [size, prefix + size]; None where plain causal attention says the same."""
    keys = prefix + size
    windowed = window is not None and window < keys
    if not prefix and not windowed:
        return None
    # All masks of a device are corners of one band: there is nothing to build for a layer or a span.
    whole = _band(-(-keys // MASK_STEP) * MASK_STEP, window if windowed else None, device)
    return whole[prefix:keys, :keys]


@lru_cache(maxsize=8)
def _band(size: int, window: int | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        place = torch.arange(size, device=device)
        back = place[:, None] - place
        return back >= 0 if window is None else (back >= 0) & (back < window)
