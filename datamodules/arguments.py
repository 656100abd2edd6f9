"""Checks of what a data module is given, with errors that name the setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datamodules.examples import Examples
from datamodules.splitting import check_fraction


def at_least(name: str, value: int, minimum: int) -> None:
    """Refuses a number below the minimum."""
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Refuses an unknown word."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_batch(batch_size: int | None, max_tokens: int | None, eval_batch_size: int | None) -> None:
    """Refuses sizes below 1, and a step that is given twice."""
    if batch_size is not None and max_tokens is not None:
        raise ValueError(f"batch_size = {batch_size} and max_tokens = {max_tokens}: give one, set the other to null")
    sizes = {"batch_size": batch_size, "max_tokens": max_tokens, "eval_batch_size": eval_batch_size}
    for name, value in sizes.items():
        if value is not None:
            at_least(name, value, 1)


def held_out_fraction(validation: Any) -> float | None:
    """The fraction, if `validation` is one; None if it is a source."""
    if not isinstance(validation, (int, float)):
        return None
    check_fraction(validation)
    return float(validation)


def too_long_for_a_step(max_tokens: int | None, train: Examples | None) -> list[str]:
    """A warning if examples alone exceed the tokens of a step; such a step holds one of them and nothing else."""
    if max_tokens is None or train is None or not (number := int((train.lengths > max_tokens).sum())):
        return []
    return [f"{number} examples of the train data are longer than max_tokens = {max_tokens}: each is a step of its own"]
