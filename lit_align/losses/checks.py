"""Argument checks that every loss shares: a wrong shape must stop, for broadcasting would hide it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors of different shapes; (4, 1) against (4,) would broadcast to (4, 4) without a word.

    Args:
        **tensors: The arguments under their own names; the first one sets the expected shape.

    Raises:
        ValueError: A shape differs from the first one's.
    """
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} must have the shape of {first}: expected {tuple(expected.shape)}, got {tuple(tensor.shape)}"
            )


def check_ndim(ndim: int, **tensors: Tensor) -> None:
    """Refuses tensors with another number of dimensions.

    Raises:
        ValueError: A tensor does not have `ndim` dimensions.
    """
    for name, tensor in tensors.items():
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimension(s), got {tensor.ndim}: shape {tuple(tensor.shape)}")


def check_mask(name: str, mask: Tensor) -> None:
    """Refuses a mask that is not bool: with 0/1 numbers `mask * nan` is nan and `~mask` is -1 or -2.

    Raises:
        ValueError: The mask's dtype is not torch.bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool mask, got {mask.dtype}; use `mask.bool()` or `mask > 0`")


def check_range(
    name: str, value: float, low: float, high: float = math.inf, *, with_low: bool = False, with_high: bool = False
) -> None:
    """Refuses a number outside an interval (open at both ends unless told otherwise), nan included.

    Raises:
        ValueError: The number lies outside.
    """
    above = value >= low if with_low else value > low
    below = value <= high if with_high else value < high
    if not (above and below):
        interval = f"{'[' if with_low else '('}{low:g}, {high:g}{']' if with_high else ')'}"
        raise ValueError(f"{name} must lie in {interval}, got {value}")


def check_constant(**tensors: Tensor) -> None:
    """Refuses tensors that carry a gradient where the formula treats them as constants.

    Raises:
        ValueError: A tensor requires a gradient.
    """
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} is a constant of this loss but requires a gradient; pass {name}.detach()")


def full_precision(values: Tensor) -> Tensor:
    """At least float32: half-precision numbers are widened, float32 and float64 stay as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
