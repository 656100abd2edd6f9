"""How much there is to do in a micro-batch, in plain numbers that are known before it reaches the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lit_align.batch.types import Example


class Work(NamedTuple):
    """Numbers of one micro-batch, computed on the host while it is laid out.

    Attributes:
        examples: B.
        sequences: S, branches of all examples.
        tokens: Unique real tokens: no padding, a prefix counted once.
        unshared: Real tokens if every branch carried its own prefix.
        computed: Positions that the trunk works on in this layout, padding and repeated prefixes included.
        padding: Those of them that are padding.
        scored: N, scored tokens.
        attended: (query, key) pairs of causal attention, a shared prefix counted once: for each example
            P^2 / 2 + the sum over its branches of P * R + R^2 / 2. (The field's convention; the diagonal counts half.)
    """

    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    unshared: int = 0
    computed: int = 0
    padding: int = 0
    scored: int = 0
    attended: float = 0.0


def work_of(examples: Sequence[Example], computed: int, padding: int, scored: int) -> Work:
    """Adds up the sizes of the examples.

    Args:
        examples: Of the micro-batch.
        computed: Positions of its layout.
        padding: Those that hold no real token.
        scored: Scored tokens.

    Returns:
        Plain ints and floats; no tensor is looked into.
    """
    sequences = tokens = unshared = 0
    attended = 0.0
    for example in examples:
        prefix = len(example.prefix_ids)
        tokens += prefix
        attended += prefix * prefix / 2
        for branch in example.branches:
            size = len(branch.input_ids)
            sequences, tokens, unshared = sequences + 1, tokens + size, unshared + prefix + size
            attended += prefix * size + size * size / 2
    return Work(len(examples), sequences, tokens, unshared, computed, padding, scored, attended)
