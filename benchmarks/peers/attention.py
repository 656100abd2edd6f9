"""This project's attention for a peer's packed rows, whose borders come under transformers' standard names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from benchmarks.packed import attention_arguments
from lit_align.models.attention import packed_attention

NAME = "lit_align_packed"
_LAST: dict[str, Any] = {"borders": None, "arguments": None}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` with the documents that `cu_seq_lens_q`, int32 [documents + 1], says."""
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    if cu_seq_lens_q is None:
        return packed_attention(module, query, key, value, attention_mask, **kwargs)
    if _LAST["borders"] is not cu_seq_lens_q:  # once a step, not once a layer
        arguments = attention_arguments(cu_seq_lens_q.diff().tolist(), str(query.device))
        _LAST.update(borders=cu_seq_lens_q, arguments=arguments)
    return packed_attention(module, query, key, value, None, **_LAST["arguments"], **kwargs)


# No mask is registered under the name: transformers then makes none, as it does for flash attention.
AttentionInterface.register(NAME, attention)
