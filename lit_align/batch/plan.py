"""The step plan: which examples each optimizer step holds, and how its work is split.

A pure function of (lengths, batch settings, seed, epoch). The examples of step s do not depend on how many
ranks or micro-batches share the work: changing either moves work, never examples. The plan also knows each
step's denominators, so no collective is needed to normalise a loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_align.batch.types import StepTotals


@dataclass(frozen=True)
class MicroPlan:
    """One micro-batch of one rank.

    Attributes:
        indices: Dataset indices of its examples; empty if the step has fewer examples than parts.
        totals: Denominators of the whole optimizer step.
    """

    indices: tuple[int, ...]
    totals: StepTotals


def epoch_order(num_examples: int, *, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the examples: int64 [num_examples], a function of seed and epoch alone."""
    if not shuffle:
        return np.arange(num_examples)
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def split_step(indices: Sequence[int], lengths: np.ndarray, parts: int) -> list[list[int]]:
    """Splits one step's examples in `parts` groups of near-equal token load (longest first, to the least loaded).

    Ties are broken by example count, then by part number, so the result is deterministic. Within a part the
    examples keep the order that they have in `indices`.
    """
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for place in sorted(range(len(indices)), key=lambda i: (-int(lengths[indices[i]]), i)):
        load, count, part = heapq.heappop(heap)
        groups[part].append(place)
        heapq.heappush(heap, (load + int(lengths[indices[place]]), count + 1, part))
    return [[int(indices[place]) for place in sorted(group)] for group in groups]


def plan_epoch(
    lengths: np.ndarray,
    trained_weights: np.ndarray,
    *,
    batch_size: int,
    parts: int,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> list[list[MicroPlan]]:
    """Plans one epoch.

    Args:
        lengths: Unique tokens of each example, int [N].
        trained_weights: Sum of the weights of each example's scored tokens, float [N].
        batch_size: Examples of an optimizer step, over all ranks and micro-batches; the last step of the epoch
            may hold fewer.
        parts: Ranks x micro-batches that share a step.
        shuffle: Whether the order is a permutation drawn from (seed, epoch).
        seed: Of the permutation.
        epoch: Of the permutation.

    Returns:
        One list per optimizer step with `parts` micro-batches each; every example stands in exactly one.
    """
    if batch_size < 1 or parts < 1:
        raise ValueError(f"batch_size and parts: expected at least 1, got {batch_size} and {parts}")
    order = epoch_order(len(lengths), shuffle=shuffle, seed=seed, epoch=epoch)
    steps = []
    for start in range(0, len(order), batch_size):
        steps.append(plan_step(order[start : start + batch_size], lengths, trained_weights, parts))
    return steps


def plan_step(indices: np.ndarray, lengths: np.ndarray, trained_weights: np.ndarray, parts: int) -> list[MicroPlan]:
    """Plans one optimizer step: its examples, given by `indices`, in `parts` micro-batches with the step's totals."""
    totals = StepTotals(tokens=float(np.sum(trained_weights[indices], dtype=np.float64)), examples=float(len(indices)))
    return [MicroPlan(tuple(group), totals) for group in split_step(indices, lengths, parts)]
