"""Mixtures: sources of which an epoch of training sees more, or less, than each example once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.formats import Source


def mixture_weights(sources: Sequence[Source], split: str) -> tuple[float, ...] | None:
    """How often an epoch sees the examples of each source; None = each once.

    Raises:
        ValueError: A weight stands beside a source that is not trained on.
    """
    weights = tuple(source.weight for source in sources)
    if all(weight == 1 for weight in weights):
        return None
    if split != "train":
        raise ValueError(f"data.{split}: a weight says how often training sees a source; leave it out here")
    return weights


def mixture_note(copies: np.ndarray | None) -> str:
    """In words, how many examples an epoch sees; nothing if it is each once.

    Args:
        copies: How often an epoch sees each example, float64 [N].

    Raises:
        ValueError: A weight is so small that no epoch would see anything of it.
    """
    if copies is None:
        return ""
    seen = 0
    for weight, count in zip(*np.unique(copies, return_counts=True), strict=True):
        seen += (part := int(weight) * int(count) + round(weight % 1 * int(count)))
        if not part:
            raise ValueError(
                f"data.train: of the {count} examples with weight {weight:g} no epoch would see any; "
                "raise the weight or leave the source out"
            )
    return f"an epoch sees {seen} by the weights of their sources"
