"""Attention over a packed row: each segment sees itself and its prefix, nothing else.

Registered with transformers under the name "packed". Without `varlen` (padded batches, `generate`) it is plain SDPA,
so one setting serves training and sampling. There is never a dense mask over the pack, and nothing is read back from
the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_align.batch import Varlen
from lit_align.models.segments import Scores, span_attention
from lit_align.models.span_sdpa import span_sdpa
from lit_align.models.varlen import installed_kernel, varlen_attention

PACKED = "packed"
UNKNOWN = ("s_aux", "position_bias")
"""Arguments of attention that change its result, and that packed rows have no form of."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    varlen: Varlen | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form that transformers calls.

    Args:
        module: The attention layer.
        query: [rows, query heads, T, D]; rows = 1 when `varlen` is given.
        key: [rows, key heads, T, D]; query heads is a multiple of key heads.
        value: Like `key`.
        attention_mask: What transformers made of the padded batch's mask; not looked at when packed.
        varlen: Who attends to whom in the packed row; None = padded batch or generation.
        dropout: Of the attention weights.
        scaling: Of the scores; None = 1 / sqrt(D).
        sliding_window: Number of keys, the query's own included, that a query may look back on.
        softcap: Scores become tanh(score / softcap) * softcap (Gemma 2).
        **kwargs: Passed on to SDPA for a padded batch.

    Returns:
        The output [rows, T, query heads, D], and None in place of the weights.
    """
    if varlen is None and is_marker(attention_mask):
        raise ValueError(
            f"{type(module).__name__}'s model does not hand its arguments on to its attention, so packed rows do not "
            "reach it; use `attention: sdpa` for this model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if varlen is None and softcap is None:
        kwargs |= {"sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if softcap is not None and dropout:
        raise ValueError("attention with soft-capped scores has no dropout here; set `attention_dropout: 0`")
    if varlen is None:
        return _capped(query, key, value, attention_mask, scale, softcap), None
    if given := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise ValueError(f"packed attention has no {given[0]!r}; use another `attention` for this model")
    query, key, value = _one_dtype(query, key, value)
    scores = Scores(scale, _window(module, sliding_window), softcap)
    return _packed(query, key, value, varlen, scores, dropout).contiguous(), None


def marker(input_ids: Tensor) -> Tensor:
    """What stands in for the attention mask of a packed row.

    A four-dimensional mask is taken for a finished one and handed through; without it transformers would find the
    restarting positions and build a dense mask over the whole pack.
    """
    return input_ids.new_zeros((1, 1, 1, 1))


def is_marker(attention_mask: Tensor | None) -> bool:
    """Whether the mask is the one of packed rows; real ones are boolean or floating."""
    return attention_mask is not None and attention_mask.ndim == 4 and attention_mask.dtype == torch.long


def _window(module: nn.Module, given: int | None) -> int | None:
    """The layer's window: some (Qwen2-MoE) know it through the mask alone, which packed rows do not have."""
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if given is None and kinds and number is not None and kinds[number] == "sliding_attention":
        return config.sliding_window
    return given


def _packed(query: Tensor, key: Tensor, value: Tensor, varlen: Varlen, scores: Scores, dropout: float) -> Tensor:
    if scores.softcap is not None or (query.device.type == "cpu" and not dropout):
        return span_attention(query, key, value, varlen.spans, scores)
    if not dropout and _has_kernel(query, value, scores.window):
        return varlen_attention(query, key, value, varlen, scores.scale, scores.window)
    return span_sdpa(query, key, value, varlen.spans, scores.scale, scores.window, dropout)


def _has_kernel(query: Tensor, value: Tensor, window: int | None) -> bool:
    """Whether torch's kernel for variable lengths takes this: the flash kernels know nothing else."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and _has_flash(query.device)
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size <= 256
        and size % 8 == 0
        and (window is None or installed_kernel().has_window)
    )


@lru_cache(maxsize=64)
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast what autocast says, as for torch's own attention; else the narrowest that there is."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind) and tensors[0].dtype != torch.float64:
        wanted = torch.get_autocast_dtype(kind)
    else:
        wanted = min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    return tuple(tensor.to(wanted) for tensor in tensors)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Padded attention with soft-capped scores; `attention_mask`: True = may attend, None = causal."""
    group, size = query.shape[1] // key.shape[1], query.shape[2]
    if attention_mask is None and size > 1:
        key, value = key[:, :, :size], value[:, :, :size]  # a static cache has room behind its keys
        attention_mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    scores = torch.tanh(query @ repeat_kv(key, group).mT * (scale / softcap)) * softcap
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ repeat_kv(value, group)).transpose(1, 2).contiguous()


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
