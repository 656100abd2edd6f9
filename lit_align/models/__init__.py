"""Networks: where they come from, how packed rows go through them, what is read off them."""

from lit_align.models import attention
from lit_align.models.forward import (
    example_loss,
    hidden_states,
    scalar_at_ends,
    scalar_at_sources,
    sequence_lengths,
    sequence_sums,
    token_logps,
    token_loss,
    token_stats,
)
from lit_align.models.head import TokenStats
from lit_align.models.modes import base_model

__all__ = [
    "TokenStats",
    "attention",
    "base_model",
    "example_loss",
    "hidden_states",
    "scalar_at_ends",
    "scalar_at_sources",
    "sequence_lengths",
    "sequence_sums",
    "token_logps",
    "token_loss",
    "token_stats",
]
