"""Holding out a part of the data, so that no prompt stands on both sides."""

from __future__ import annotations

import hashlib

import numpy as np


def hold_out(keys: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses the rows to hold out: all rows of a seeded choice of prompts.

    Args:
        keys: Number of each row's prompt, int64 [N]; rows with equal numbers stay together.
        fraction: Share of the distinct prompts to hold out, rounded, but at least one prompt on each side.
        seed: Of the choice.

    Returns:
        True = held out, bool [N].

    Raises:
        ValueError: The fraction is not between 0 and 1, or there are not two distinct prompts.
    """
    check_fraction(fraction)
    prompts = np.unique(keys)
    if len(prompts) < 2:
        raise ValueError(
            f"validation: cannot split off a fraction of {fraction:g}, for all {len(keys)} examples have the same "
            "prompt; give a validation file"
        )
    size = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    # By digest, not by a generator: which prompts are held out changes little when others are added.
    order = sorted(prompts.tolist(), key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode()).digest())
    return np.isin(keys, order[:size])


def check_fraction(fraction: float) -> None:
    """Refuses what is not a fraction."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation: expected a source or a fraction between 0 and 1, got {fraction:g}")
