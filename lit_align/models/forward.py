"""One forward for every stage: trunk, hidden states of the scored positions, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_align.batch import MicroBatch, example_parts, token_parts
from lit_align.models.attention import PACKED
from lit_align.models.head import LossOfPart, TokenStats, head_logps, head_loss, head_stats
from lit_align.models.projection import chunk_rows


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
    else:
        _check_packable(trunk)
        # A four-dimensional mask is taken for a finished one and handed through; without it transformers would
        # find the restarting positions and build a dense mask over the whole pack. "packed" never looks at it.
        layout = {"attention_mask": batch.input_ids.new_zeros((1, 1, 1, 1)), "segments": batch.segments}
    output = trunk(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **layout)
    return output.last_hidden_state.flatten(0, 1)


def _check_packable(trunk: nn.Module) -> None:
    attention = trunk.config._attn_implementation
    if attention != PACKED:
        # Any other attention would take the mask at its word: every token would see the whole pack, the future too.
        raise ValueError(
            f"{type(trunk).__name__} with attention {attention!r} cannot take packed batches; use `attention: packed` "
            "where the architecture has it, else `layout: padded` in the data module"
        )


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


def example_loss(model: nn.Module, batch: MicroBatch, loss_of: LossOfPart) -> Tensor:
    """A loss that is a sum over examples: as `token_loss`, but each part holds whole examples (`example_parts`)."""
    parts = example_parts(batch, _rows(model, batch))
    return head_loss(base_model(model), _predicting(model, batch), parts, loss_of)


def token_stats(
    model: nn.Module, batch: MicroBatch, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenStats:
    """Log-probability, entropy and rank-1 flag of each scored token, N rows in float32, for any loss.

    A micro-batch without scored tokens gives empty rows that still reach every parameter in backward, so that
    ranks stay in step.
    """
    hidden = _predicting(model, batch)
    return head_stats(base_model(model), hidden, batch.scored.targets, temperature, entropy_gradient)


def token_logps(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability in nats of each scored token, float32 [N]; cheapest with gradients off."""
    hidden = _predicting(model, batch)
    score = head_stats if torch.is_grad_enabled() else head_logps
    found = score(base_model(model), hidden, batch.scored.targets, temperature)
    return found.logps if isinstance(found, TokenStats) else found


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
    return ones.new_zeros(batch.num_sequences).index_add(0, batch.scored.sequences, ones)


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
