"""One forward for every stage: trunk, hidden states of the scored positions, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_align.batch import MicroBatch
from lit_align.models.attention import PACKED, marker
from lit_align.models.head import TokenStats, head_stats
from lit_align.models.unpacking import rectangle, tell_unpacked


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, out of the adapters' wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Last hidden states of all positions of the micro-batch.

    Args:
        model: Causal language model or sequence classifier, with adapters or without.
        batch: Packed or padded.

    Returns:
        [rows * columns, H] in the model's dtype; what stands at padded positions means nothing.
    """
    trunk = base_model(model).base_model
    if batch.segments is None:
        layout = {"attention_mask": batch.attention_mask}
    elif trunk.config._attn_implementation != PACKED:
        return _unpacked(trunk, batch)
    else:
        layout = {"attention_mask": marker(batch.input_ids), "varlen": batch.varlen}
    return _last_hidden(trunk, batch.input_ids, batch.position_ids, **layout)


def _unpacked(trunk: nn.Module, batch: MicroBatch) -> Tensor:
    """Hidden states of the packed positions from a trunk that cannot take a packed row."""
    tell_unpacked(type(trunk).__name__, trunk.config._attn_implementation)
    padded = rectangle(batch.segments).to(batch.input_ids.device)
    ids, positions = batch.input_ids[0][padded.sources], batch.position_ids[0][padded.sources]
    return _last_hidden(trunk, ids, positions, attention_mask=padded.attention_mask)[padded.places]


def _last_hidden(trunk: nn.Module, input_ids: Tensor, position_ids: Tensor, **layout: Any) -> Tensor:
    return trunk(input_ids=input_ids, position_ids=position_ids, use_cache=False, **layout).last_hidden_state.flatten(
        0, 1
    )


def token_stats(
    model: nn.Module, batch: MicroBatch, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenStats:
    """Log-probability, entropy and rank-1 flag of each scored token, N rows in float32.

    A micro-batch without scored tokens gives empty rows that still reach every parameter in backward, so that
    ranks stay in step.
    """
    hidden = hidden_states(model, batch)
    if len(batch.scored) == 0:
        reached = [hidden, *base_model(model).get_output_embeddings().parameters()]
        nothing = torch.stack([tensor.float().sum() for tensor in reached])[:0]
        return TokenStats(nothing, nothing, nothing.detach())
    sources, targets = batch.scored.sources, batch.scored.targets
    return head_stats(base_model(model), hidden[sources], targets, temperature, entropy_gradient)


def token_logps(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability in nats of each scored token, float32 [N]."""
    return token_stats(model, batch, temperature).logps


def sequence_sums(values: Tensor, batch: MicroBatch) -> Tensor:
    """Sums numbers per scored token [N] over each sequence: [S].

    In float64 where the device has it: a response has hundreds of nats, of which float32 keeps four decimals, and
    preference losses look at differences between them.
    """
    wide = values if values.device.type == "mps" else values.double()
    return wide.new_zeros(batch.num_sequences).index_add(0, batch.scored.sequences, wide)


def sequence_lengths(batch: MicroBatch) -> Tensor:
    """Scored tokens of each sequence, float32 [S]."""
    return torch.bincount(batch.scored.sequences, minlength=batch.num_sequences).float()


def scalar_at_ends(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The scalar head's value at the last real token of each sequence, float32 [S].

    The position comes from lengths, never from comparing ids with `pad_token_id`: where padding and end of turn
    are one token, that comparison reads one token early.
    """
    return _scalar(model, hidden_states(model, batch)[batch.ends])


def scalar_at_sources(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The scalar head's value at the state before each scored token, float32 [N]: a critic's V_t."""
    return _scalar(model, hidden_states(model, batch)[batch.scored.sources])


def _scalar(model: nn.Module, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return base_model(model).score(hidden.float())[:, 0].float()
