"""Losses of pre-training and supervised fine-tuning: the next token's negative log-likelihood."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_align.losses.checks import check_ndim, check_range, check_same_shape, full_precision


def shifted_cross_entropy(
    logits: Tensor, labels: Tensor, normaliser: float | Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of each token under the logits one position before it, in nats per trained token.

    loss = -1/normaliser * sum_{b, t>0, labels[b,t] != ignore_index} log softmax(logits[b, t-1])[labels[b, t]]

    The maximum-likelihood objective of causal language models; the shift happens here and nowhere else. The first
    label of a row has nothing before it and is never trained; the last logits predict nothing.

    Args:
        logits: [B, T, V], any float dtype; half precision is widened to float32 first.
        labels: int64 [B, T], aligned with the inputs (not shifted); `ignore_index` = not trained.
        normaliser: Denominator; None = the number of trained tokens of *this call* (at least 1). For a step of
            several micro-batches pass the step's count: the mean of means is not the mean.
        ignore_index: Label of a token that is not trained.

    Returns:
        Scalar, float32 (float64 for float64 logits); 0, with a gradient of zeros, when no token is trained.

    Raises:
        ValueError: Shapes do not fit, or a plain-number normaliser is not positive.
    """
    check_ndim(3, logits=logits)
    if labels.shape != logits.shape[:2]:
        expected = tuple(logits.shape[:2])
        raise ValueError(f"labels must be [B, T] of logits: expected {expected}, got {tuple(labels.shape)}")
    if isinstance(normaliser, (int, float)):
        check_range("normaliser", normaliser, 0)
    predictions = full_precision(logits[:, :-1]).flatten(0, 1)
    targets = labels[:, 1:].flatten()
    total = cross_entropy(predictions, targets, ignore_index=ignore_index, reduction="sum")
    if normaliser is None:
        normaliser = (targets != ignore_index).sum().clamp(min=1)
    return total / normaliser


def weighted_nll(token_logps: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood of the scored tokens, summed: -sum_i w_i log p_i.

    A sum, not a mean: the caller divides by the total weight of the whole optimizer step, so that the update does
    not depend on how the step is split. With all weights 1 and that division it equals `shifted_cross_entropy`.

    Args:
        token_logps: Log-probability of each scored token in nats, float [N].
        weights: Loss weight of each, float [N], >= 0.

    Returns:
        Scalar, float32 (float64 for float64).

    Raises:
        ValueError: The shapes differ.
    """
    check_same_shape(token_logps=token_logps, weights=weights)
    return -(full_precision(token_logps) * weights).sum()
