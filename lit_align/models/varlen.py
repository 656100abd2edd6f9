"""Attention over a packed row in one call of a kernel with variable lengths: what a GPU is fastest at.

Keys and values that several spans see are laid out once for each of them, so that the kernel meets plain sequences
whose queries are the last of their keys. That layout is not kept for backward but made again, and its gradient is
summed in float32, copy by copy, in one order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align.batch import KeyGather, Varlen

_BACKWARD_ARGUMENTS = [
    *("grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
    *("is_causal", "rng_state", "scale", "window_size"),
]


class VarlenKernel:
    """One form of torch's `varlen_attn`: its arguments differ between versions.

    Args:
        function: `varlen_attn` itself, or one of the same form.
        backward: The operator that computes its gradients from its output and the scores' log-sum-exp; None = unknown
            in this version, then autograd keeps what it needs.
    """

    def __init__(self, function: Callable[..., Any], backward: Callable[..., Any] | None = None) -> None:
        self.function = function
        names = inspect.signature(function).parameters
        self.has_window = "window_size" in names
        self.has_scale = "scale" in names
        self.has_gqa = "enable_gqa" in names
        self.backward = backward if self.has_window and self.has_scale and "return_aux" in names else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, varlen: Varlen, scale: float, window: int | None, **aux: Any
    ) -> Any:
        """Causal attention, the last query of each span aligned with its last key.

        Args:
            query: [T, query heads, D].
            key: [K, key heads, D].
            value: [K, key heads, D].
            varlen: Bounds of the spans.
            scale: Of the scores.
            window: Keys, the query's own included, that a query may look back on; None = all.
            **aux: Passed on.

        Returns:
            [T, query heads, D], and what `aux` asks for.
        """
        options = dict(aux)
        if self.has_window:
            options["window_size"] = window_size(window)
        else:
            options["is_causal"] = True
        if self.has_scale:
            options["scale"] = scale
        else:
            query = query * (scale * sqrt(query.shape[-1]))
        if self.has_gqa and query.shape[1] != key.shape[1]:
            options["enable_gqa"] = True
        bounds = (varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_q, varlen.max_k)
        return self.function(query, key, value, *bounds, **options)


def window_size(window: int | None) -> tuple[int, int]:
    """Keys before and after its own that a query sees, as the kernel counts them: -1 = all before, 0 = none after."""
    return (-1 if window is None else window - 1, 0)


@lru_cache(maxsize=1)
def installed_kernel() -> VarlenKernel:
    """The kernel of the torch at hand."""
    from torch.nn.attention.varlen import varlen_attn

    try:
        backward = torch.ops.torch_attn._varlen_attn_backward
        known = [argument.name for argument in backward.default._schema.arguments] == _BACKWARD_ARGUMENTS
    except AttributeError:
        known = False
    return VarlenKernel(varlen_attn, backward if known else None)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    varlen: Varlen,
    scale: float,
    window: int | None = None,
    kernel: VarlenKernel | None = None,
) -> Tensor:
    """Attention over a packed row.

    Args:
        query: [1, query heads, T, D], bfloat16 or float16 for torch's own kernel.
        key: [1, key heads, T, D]; query heads is a multiple of key heads.
        value: Like `key`.
        varlen: Bounds of the row's spans, on the same device.
        scale: Of the scores.
        window: Keys, the query's own included, that a query may look back on; None = all. Needs `kernel.has_window`.
        kernel: Default: that of the torch at hand.

    Returns:
        [1, T, query heads, D].
    """
    kernel = kernel or installed_kernel()
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    group = 1 if kernel.has_gqa else query.shape[1] // key.shape[1]
    if varlen.gather is None and group == 1:
        return kernel(query, key, value, varlen, scale, window)[None]
    if kernel.backward is not None:
        return _GatheredAttention.apply(query, key, value, varlen, scale, window, kernel, group)[None]
    key, value = (_Gather.apply(tensor, varlen.gather, group) for tensor in (key, value))
    return kernel(query, key, value, varlen, scale, window)[None]


class _Gather(torch.autograd.Function):
    """Keys or values as the kernel needs them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gather: KeyGather | None, group: int) -> Tensor:
        ctx.gather, ctx.group, ctx.dtype = gather, group, tensor.dtype
        return _gathered(tensor, gather, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _ungathered(gradient, ctx.gather, ctx.group, ctx.dtype), None, None


class _GatheredAttention(torch.autograd.Function):
    """Gather and kernel in one, so that the gathered keys and values need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        scale: float,
        window: int | None,
        kernel: VarlenKernel,
        group: int,
    ) -> Tensor:
        from torch.nn.attention.varlen import AuxRequest

        keys, values = (_gathered(tensor, varlen.gather, group) for tensor in (key, value))
        output, lse = kernel(query, keys, values, varlen, scale, window, return_aux=AuxRequest(lse=True))
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.varlen, ctx.scale, ctx.window, ctx.kernel, ctx.group = varlen, scale, window, kernel, group
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        varlen, gather, group = ctx.varlen, ctx.varlen.gather, ctx.group
        keys, values = (_gathered(tensor, gather, group) for tensor in (key, value))
        into_query, into_keys, into_values = ctx.kernel.backward(
            *(gradient.contiguous(), query, keys, values, output, lse),
            *(varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_q, varlen.max_k),
            ctx.window is None,
            torch.zeros(2, dtype=torch.uint64, device=query.device),  # the state of a dropout that there is not
            ctx.scale,
            list(window_size(ctx.window)),
        )
        into_key = _ungathered(into_keys, gather, group, key.dtype)
        into_value = _ungathered(into_values, gather, group, value.dtype)
        return into_query, into_key, into_value, None, None, None, None, None


def _gathered(tensor: Tensor, gather: KeyGather | None, group: int) -> Tensor:
    """[T, key heads, D] as [K, key heads * group, D]."""
    tensor = tensor if gather is None else tensor.index_select(0, gather.keys)
    return tensor if group == 1 else tensor.repeat_interleave(group, 1)


def _ungathered(gradient: Tensor, gather: KeyGather | None, group: int, dtype: torch.dtype) -> Tensor:
    """The gradient of `_gathered`'s input, summed in float32 at least."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if group > 1:
        gradient = gradient.unflatten(1, (-1, group)).sum(2, dtype=wide)
    if gather is None:
        return gradient.to(dtype)
    found = gradient.index_select(0, gather.own).to(wide)
    copies = gradient[gather.copies].sum(1, dtype=wide)  # by integers; each token's copies in their order
    return found.index_add_(0, gather.prefix, copies).to(dtype)  # no token twice, so no order to depend on
