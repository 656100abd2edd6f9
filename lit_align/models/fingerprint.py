"""A short name for the exact contents of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_align.models.adapters import plain_name
from lit_align.models.modes import has_adapters

TRAINED_WHOLE = ".original_module."
"""Marks peft's idle copy of a module that is trained whole."""


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the module's parameters: name, dtype, shape and bytes of each, sorted by name.

    Equal for equal weights wherever they lie and however they were made; one flipped bit changes it. Sharded
    parameters are gathered one at a time, so every rank must call it.

    Returns:
        64 hexadecimal digits.
    """
    return _digest(module.named_parameters())


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the frozen base under a model's adapters: training the adapters does not change it.

    It equals `fingerprint` of the plain model that the adapters were put on. A head that is trained along with
    the adapters is no part of the base.
    """
    if not has_adapters(model):
        return fingerprint(model)
    named = ((name, p) for name, p in model.named_parameters() if TRAINED_WHOLE not in name)
    return _digest((plain, p) for name, p in named if (plain := plain_name(name)))


def _digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(content.numpy().data)
    return digest.hexdigest()
