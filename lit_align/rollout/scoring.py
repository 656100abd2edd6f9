"""Reading numbers off networks for answers that have been sampled: one forward per micro-batch, no gradient.

Ranks have answers of their own, and as many micro-batches as these make: a sharded network is gathered once, before.
All ranks have to ask for the same numbers, those without answers too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lit_align.batch import Example, LayOut, MicroBatch, StepTotals, pack
from lit_align.models import scalar_at_ends, scalar_at_sources, sequence_lengths, token_logps
from lit_align.models.modes import evaluating
from lit_align.models.sharding import unsharded

SCORED_TOKENS = 8192
"""Unique tokens that are scored side by side, unless a stage says otherwise."""
_TOTALS = StepTotals(1.0, 1.0)


def check_vocabulary(policy: nn.Module, reward_model: nn.Module) -> None:
    """Refuses a reward model that cannot read the policy's token ids.

    Raises:
        ValueError: Its vocabulary is smaller. (One more entry is its own padding.)
    """
    ours, theirs = policy.config.vocab_size, reward_model.config.vocab_size
    if theirs not in (ours, ours + 1):
        raise ValueError(
            f"reward_model: it reads the policy's token ids, but its vocabulary has {theirs} entries and the "
            f"policy's {ours}; use a reward model trained with the policy's tokenizer"
        )


def micro_batches(
    examples: Sequence[Example], max_tokens: int, device: torch.device, lay_out: LayOut = pack
) -> Iterator[MicroBatch]:
    """The examples in their order, as many at a time as `max_tokens` unique tokens hold, laid out, on the device.

    One example alone may hold more. A padded layout has more positions than unique tokens.
    """
    start, tokens = 0, 0
    for stop, example in enumerate(examples):
        if stop > start and tokens + len(example) > max_tokens:
            yield lay_out(examples[start:stop], range(start, stop), _TOTALS).to(device)
            start, tokens = stop, 0
        tokens += len(example)
    if start < len(examples):
        yield lay_out(examples[start:], range(start, len(examples)), _TOTALS).to(device)


def answer_logps(model: nn.Module, batches: Sequence[MicroBatch], temperature: float) -> list[Tensor]:
    """Log-probabilities in nats of each answer's tokens under softmax(logits / temperature), on the CPU."""
    return _per_sequence(lambda batch: token_logps(model, batch, temperature), model, batches)


def answer_values(model: nn.Module, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """The critic's value at the state before each of an answer's tokens, on the CPU."""
    return _per_sequence(lambda batch: scalar_at_sources(model, batch), model, batches)


@torch.no_grad()
def answer_rewards(model: nn.Module, batches: Sequence[MicroBatch]) -> Tensor:
    """The reward model's value at each answer's last token, float32 [S], on the CPU."""
    with unsharded(model), evaluating(model):
        return torch.cat([torch.zeros(0), *(scalar_at_ends(model, batch).cpu() for batch in batches)])


@torch.no_grad()
def _per_sequence(
    read: Callable[[MicroBatch], Tensor], model: nn.Module, batches: Sequence[MicroBatch]
) -> list[Tensor]:
    with unsharded(model), evaluating(model):
        return [
            row
            for batch in batches
            for row in read(batch).cpu().split([int(n) for n in sequence_lengths(batch).tolist()])
        ]
