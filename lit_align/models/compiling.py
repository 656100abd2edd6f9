"""`torch.compile`, layer by layer: one small graph serves all of them, so compiling costs the same at any depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from lit_align.models.attention import PACKED, packed_attention
from lit_align.models.layers import decoder_layers


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer in place, for rows of any length; names of weights stay as they are.

    Attention stays outside of the graphs: what it is told of the packed row are plain numbers, which a graph would
    take for constants and be made anew for every micro-batch.
    """
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While open, compiled layers run as they were written: a decode loop's caches would have them compiled anew."""
    layers = [module for module in model.modules() if module._compiled_call_impl is not None]
    compiled = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call
