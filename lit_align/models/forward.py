"""One forward for every stage: trunk, hidden states of the scored positions, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_align.batch import MicroBatch, example_parts, token_parts
from lit_align.models.attention import PACKED, marker
from lit_align.models.head import LossOfPart, TokenStats, head_logps, head_loss, head_stats
from lit_align.models.modes import base_model
from lit_align.models.projection import chunk_rows
from lit_align.models.sharding import through_root
from lit_align.models.unpacking import rectangle, tell_unpacked


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
    output = trunk(input_ids=input_ids, position_ids=position_ids, use_cache=False, **layout)
    return output.last_hidden_state.flatten(0, 1)


@through_root
def token_loss(
    model: nn.Module,
    batch: MicroBatch,
    loss_of: LossOfPart,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Tensor:
    """A loss that is a sum over scored tokens; its part of the head costs three matrix products and bounded memory.

    Args:
        model: Causal language model, with adapters or without.
        batch: Packed or padded.
        loss_of: Gives the loss of a run of the scored tokens (see `token_parts`), summed over them. Called once for
            each run; it may depend on trained weights through the stats alone.
        temperature: Divides the logits.
        entropy_gradient: Whether the loss depends on the entropy too.

    Returns:
        The sum over the micro-batch, a scalar; 0 with gradients of 0 where nothing is scored, so that ranks stay in
        step.
    """
    parts = token_parts(batch, _rows(model, batch))
    return head_loss(base_model(model), _predicting(model, batch), parts, loss_of, temperature, entropy_gradient)


@through_root
def example_loss(model: nn.Module, batch: MicroBatch, loss_of: LossOfPart) -> Tensor:
    """A loss that is a sum over examples: as `token_loss`, but each part holds whole examples (`example_parts`)."""
    parts = example_parts(batch, _rows(model, batch))
    return head_loss(base_model(model), _predicting(model, batch), parts, loss_of)


@through_root
def token_stats(
    model: nn.Module, batch: MicroBatch, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenStats:
    """Log-probability, entropy and rank-1 flag of each scored token, N rows in float32, for any loss.

    A micro-batch without scored tokens gives empty rows that still reach every parameter in backward, so that
    ranks stay in step.
    """
    hidden = _predicting(model, batch)
    return head_stats(base_model(model), hidden, batch.scored.targets, temperature, entropy_gradient)


@through_root
def token_logps(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability in nats of each scored token, float32 [N]; cheapest with gradients off."""
    arguments = (base_model(model), _predicting(model, batch), batch.scored.targets, temperature)
    return head_stats(*arguments).logps if torch.is_grad_enabled() else head_logps(*arguments)


def _predicting(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The hidden states that predict the scored tokens, [N, H]."""
    return hidden_states(model, batch).index_select(0, batch.scored.sources)


def _rows(model: nn.Module, batch: MicroBatch) -> int:
    vocabulary = base_model(model).get_output_embeddings().weight.shape[0]
    return chunk_rows(vocabulary, batch.input_ids.device)


def sequence_sums(values: Tensor, batch: MicroBatch) -> Tensor:
    """Sums numbers per scored token [N] over each sequence: [S].

    In float64 where the device has it: a response has hundreds of nats, of which float32 keeps four decimals, and
    preference losses look at differences between them.
    """
    wide = values if values.device.type == "mps" else values.double()
    return wide.new_zeros(batch.num_sequences).index_add(0, batch.scored.sequences, wide)


def sequence_lengths(batch: MicroBatch) -> Tensor:
    """Scored tokens of each sequence, float32 [S], on the device."""
    ones = torch.ones_like(batch.scored.weights)
    # Not `bincount`: how long its result is depends on the data, so the host would wait for it.
    return ones.new_zeros(batch.num_sequences).index_add(0, batch.scored.sequences, ones)


@through_root
def scalar_at_ends(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The scalar head's value at the last real token of each sequence, float32 [S].

    The position comes from lengths, never from comparing ids with `pad_token_id`: where padding and end of turn
    are one token, that comparison reads one token early.
    """
    return _scalar(model, hidden_states(model, batch)[batch.ends])


@through_root
def scalar_at_sources(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The scalar head's value at the state before each scored token, float32 [N]: a critic's V_t."""
    return _scalar(model, hidden_states(model, batch)[batch.scored.sources])


def _scalar(model: nn.Module, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return base_model(model).score(hidden.float())[:, 0].float()
