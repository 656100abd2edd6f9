"""Whether the sequences of a run fit the positions that its networks know; asked before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_align.models.modes import base_model

MEND = "lower data.max_length (data.block_size in pre-training) or, where answers are sampled, sampling.max_new_tokens"
OFFSETS = 2
"""Rows that a table may have beside those of positions: OPT's begins at the third."""


def check_positions(networks: Iterable[tuple[str, nn.Module]], longest: int, new_tokens: int = 0) -> None:
    """Refuses sequences that a table of positions has no rows for, and warns of those that are only unknown.

    Args:
        networks: By name.
        longest: Tokens of the longest sequence of the data.
        new_tokens: How many are sampled after it, at most.

    Raises:
        ValueError: Says which lengths do not fit, and what to change.
    """
    beyond: dict[int, list[str]] = {}
    for name, network in networks:
        model = base_model(network)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or not 0 < limit < longest + new_tokens:
            continue
        if has_position_table(model, limit):
            raise ValueError(f"{name}: {_lengths(longest, new_tokens)}, but its table of positions has {limit}; {MEND}")
        beyond.setdefault(limit, []).append(name)
    for limit, names in beyond.items():
        rank_zero_warn(
            f"{', '.join(names)}: {_lengths(longest, new_tokens)}, and max_position_embeddings is {limit}: beyond it "
            f"positions are new to the model; {MEND}"
        )


def _lengths(longest: int, new_tokens: int) -> str:
    if not new_tokens:
        return f"a sequence may have {longest} tokens"
    return (
        f"a prompt may have {longest} tokens and sampling.max_new_tokens is {new_tokens}, together "
        f"{longest + new_tokens}"
    )


def has_position_table(model: Any, limit: int) -> bool:
    """Whether a model looks positions up in a table of a fixed size: learned ones, or GPT-J's sines.

    Args:
        model: A model of transformers.
        limit: Positions that its configuration names.
    """
    words = model.get_input_embeddings().weight
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not words)
    sines = (buffer for name, buffer in model.named_buffers() if name.endswith(".embed_positions"))
    return any(limit <= len(table) <= limit + OFFSETS for table in chain(tables, sines))
