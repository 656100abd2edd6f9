"""One forward for every stage: trunk, hidden states of the scored positions, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_align.batch import MicroBatch
from lit_align.models.attention import PACKED
from lit_align.models.head import TokenStats, head_stats
from lit_align.models.modes import base_model
from lit_align.models.sharding import through_root


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


@through_root
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
