"""From hidden states to log-probabilities of given tokens, without keeping [tokens, vocabulary] logits.

The vocabulary projection runs over chunks of rows; the backward pass computes each chunk again. All of it is in
float32, whatever the weights are: bfloat16 logits are too coarse for KL divergences and ratios.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_ROWS = 1024


class TokenStats(NamedTuple):
    """What the head says of each scored token; N rows, float32.

    Attributes:
        logps: log p(target), in nats; differentiable.
        entropy: Entropy of the whole distribution, in nats; differentiable.
        correct: 1.0 where the target is the most probable token, else 0.0; no gradient.
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor


def head_stats(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk_rows: int = CHUNK_ROWS
) -> TokenStats:
    """Scores `targets` under softmax(logits / temperature).

    Args:
        model: The causal language model whose head is used: its weight, bias, scale and soft-cap.
        hidden: Hidden states that predict the targets, [N, H].
        targets: Token ids, int64 [N].
        temperature: Divides the logits; the same as in sampling.
        chunk_rows: Rows of logits held at a time.

    Returns:
        One row per target.
    """
    chunks = [
        checkpoint(_chunk, model, h, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    ]
    return TokenStats(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _chunk(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    logits = head_logits(model, hidden) / temperature
    log_normaliser = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    expected = (torch.softmax(logits, -1) * logits).sum(-1)
    correct = (logits.detach().argmax(-1) == targets).float()
    return chosen - log_normaliser, log_normaliser - expected, correct


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits in float32 [N, V] of hidden states [N, H], with the model's own post-processing.

    Covers a bias (Phi), a multiplier (Cohere: `logit_scale`), a divisor (Granite: `logits_scaling`) and
    soft-capping (Gemma 2: `final_logit_softcapping`).
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    with torch.autocast(hidden.device.type, enabled=False):
        if isinstance(head, torch.nn.Linear) and type(head) is torch.nn.Linear:
            bias = None if head.bias is None else head.bias.float()
            logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)
        else:
            logits = head(hidden).float()
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits
