"""Sums, means and whitening over the part of a tensor that counts.

In every mask True = the value counts. Values where it is False are never read: nan and inf there change neither
the result nor the gradient, because they are replaced (`torch.where`), not multiplied by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.losses.checks import check_mask, check_same_shape, full_precision

WHITEN_EPS = 1e-8
"""Added to the variance, so that values without spread whiten to zeros."""


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of the values that count: sum_i m_i x_i.

    Args:
        values: Any float dtype and shape; half precision is summed in float32.
        mask: bool, shape of `values`; True = counts.
        dim: Dimension(s) to sum over; None = all.

    Returns:
        The sum; 0, with a gradient of 0, where nothing counts.

    Raises:
        ValueError: The shapes differ or the mask is not bool.
    """
    check_same_shape(values=values, mask=mask)
    check_mask("mask", mask)
    return torch.where(mask, full_precision(values), 0.0).sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of the values that count: sum_i m_i x_i / sum_i m_i.

    The denominator is the number of True entries of *this call* (along `dim`), so the mean of means over
    micro-batches is not the mean of the batch; a loss divides a sum by the whole step's count instead.

    Args:
        values: Any float dtype and shape; half precision is averaged in float32.
        mask: bool, shape of `values`; True = counts.
        dim: Dimension(s) to average over; None = all.

    Returns:
        The mean; 0, with a gradient of 0, where nothing counts.

    Raises:
        ValueError: The shapes differ or the mask is not bool.
    """
    return masked_sum(values, mask, dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values shifted and scaled to mean 0 and variance 1 over the entries that count.

    y_i = (x_i - mean) / sqrt(var + 1e-8), var = sum_i m_i (x_i - mean)^2 / sum_i m_i        (biased variance)

    [1, 2, 3, 4] becomes [-1.3416, -.4472, .4472, 1.3416]; with the unbiased variance, which some libraries use,
    it would be [-1.1619, -.3873, .3873, 1.1619].

    Args:
        values: Any float dtype and shape; the statistics are over all of them, so pass the whole rollout at once.
        mask: bool, shape of `values`; True = counts.
        shift_mean: False adds the mean back after scaling (the form used for rewards, whose level matters).

    Returns:
        float32 (float64 for float64), shape of `values`; 0 outside the mask, zeros when at most one entry counts or
        all are equal (with `shift_mean=False`: the mean).

    Raises:
        ValueError: The shapes differ or the mask is not bool.
    """
    values = full_precision(values)
    mean = masked_mean(values, mask)
    centred = torch.where(mask, values - mean, 0.0)
    # The mean is rounded; taking the mean of what is left keeps large equal values from whitening to +-1.
    centred = torch.where(mask, centred - masked_mean(centred, mask), 0.0)
    whitened = centred * torch.rsqrt(masked_mean(centred.square(), mask) + WHITEN_EPS)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)
