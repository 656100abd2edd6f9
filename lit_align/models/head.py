"""From hidden states to log-probabilities of given tokens, without keeping [tokens, vocabulary] logits.

The vocabulary projection runs over chunks of rows; where there are many, the backward pass computes each chunk again
instead of keeping it. All of it is in float32, whatever the weights are: bfloat16 logits are too coarse for KL
divergences and ratios.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_align.models.modes import evaluating
from lit_align.models.sharding import through_root

CHUNK_ROWS = 1024
KEPT_LOGITS = 2**23
"""So many logits (32 MiB) are kept for the backward pass rather than computed again."""


class TokenStats(NamedTuple):
    """What the head says of each scored token; N rows, float32.

    Attributes:
        logps: log p(target), in nats; differentiable.
        entropy: Entropy of the whole distribution, in nats; differentiable if that was asked for.
        correct: 1.0 where the target is the most probable token, else 0.0; no gradient.
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor


def head_stats(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenStats:
    """Scores `targets` under softmax(logits / temperature).

    Args:
        model: The causal language model whose head is used: its weight, bias, scale and soft-cap.
        hidden: Hidden states that predict the targets, [N, H].
        targets: Token ids, int64 [N].
        temperature: Divides the logits; the same as in sampling.
        entropy_gradient: Whether the entropy is differentiable too.
        chunk_rows: Rows of logits computed at a time.

    Returns:
        One row per target.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    arguments = (model, temperature, entropy_gradient)
    chunks = []
    for part, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
        if len(hidden) * vocabulary > KEPT_LOGITS and torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk, part, wanted, *arguments, use_reentrant=False))
        else:
            chunks.append(_chunk(part, wanted, *arguments))
    return TokenStats(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _chunk(
    hidden: Tensor, targets: Tensor, model: PreTrainedModel, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, ...]:
    logps = torch.log_softmax(head_logits(model, hidden) / temperature, -1)  # [rows, V]
    chosen = logps.gather(-1, targets[:, None])[:, 0]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        distribution = logps if entropy_gradient else logps.detach()
        entropy = -(distribution.exp() * distribution).sum(-1)
    correct = (logps.detach().argmax(-1) == targets).float()
    return chosen, entropy, correct


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


@through_root
def _known_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return head_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares `head_logits` with the model's own logits on four tokens, once, when a policy is built.

    Raises:
        ValueError: The architecture does something to its logits that `head_logits` does not know.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[0]
        own, known = logits.float(), _known_logits(model, ids)
    # The model's own head may work in bfloat16, which has 8 bits.
    tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
    difference = float((own - known).abs().max() / own.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise ValueError(
            f"{type(model).__name__} post-processes its logits in a way that is not known here (relative difference "
            f"{difference:.2g}): its log-probabilities would be wrong"
        )
