"""The step plan: which examples each optimizer step holds, and how its work is split.

A pure function of (lengths, batch settings, seed, epoch). The examples of step s do not depend on how many
ranks or micro-batches share the work: changing either moves work, never examples. The plan also knows each
step's denominators, so no collective is needed to normalise a loss.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lit_align.batch.types import StepTotals

WINDOW = 1024
"""Shuffled examples among which steps of a number of tokens are filled."""


@dataclass(frozen=True)
class MicroPlan:
    """One micro-batch of one rank.

    Attributes:
        indices: Dataset indices of its examples; empty if the step has fewer examples than parts.
        totals: Denominators of the whole optimizer step.
        repeats: For each of them, how often the step holds the same example before it (more than 0 only where an
            epoch visits examples several times).
    """

    indices: tuple[int, ...]
    totals: StepTotals
    repeats: tuple[int, ...] = ()


@dataclass(frozen=True)
class EpochPlan(Sequence[list[MicroPlan]]):
    """The optimizer steps of an epoch; a step's micro-batches are planned when they are asked for.

    Attributes:
        order: Dataset indices in the order in which the epoch visits them, int64 [M].
        bounds: Step s holds `order[bounds[s] : bounds[s + 1]]`, int64 [steps + 1].
        lengths: Unique tokens of each example, int [N].
        trained_weights: Sum of the weights of each example's scored tokens, float [N].
        parts: Ranks x micro-batches that share a step.
    """

    order: np.ndarray
    bounds: np.ndarray
    lengths: np.ndarray
    trained_weights: np.ndarray
    parts: int

    def __len__(self) -> int:
        """Optimizer steps."""
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, step: int) -> list[MicroPlan]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[MicroPlan]]: ...
    def __getitem__(self, step: int | slice) -> list[MicroPlan] | list[list[MicroPlan]]:
        """The step's `parts` micro-batches; every example of the step stands in exactly one."""
        if isinstance(step, slice):
            return [self[s] for s in range(*step.indices(len(self)))]
        return plan_step(self.examples(step), self.lengths, self.trained_weights, self.parts)

    def examples(self, step: int) -> np.ndarray:
        """Dataset indices of a step's examples, whatever shares its work, int64."""
        if not 0 <= step < len(self):
            raise IndexError(f"step: expected 0 <= step < {len(self)}, got {step}")
        return self.order[self.bounds[step] : self.bounds[step + 1]]


def epoch_order(
    num_examples: int, *, shuffle: bool, seed: int, epoch: int, copies: np.ndarray | None = None
) -> np.ndarray:
    """The order in which an epoch visits the examples: a function of seed, epoch and copies alone.

    Args:
        num_examples: N.
        shuffle: Whether the order is a permutation drawn from (seed, epoch); else the examples stand in file order.
        seed: Of the permutation.
        epoch: Of the permutation.
        copies: How often the epoch visits each example, float [N]; None = once. Of the examples that share a number
            with a fraction f, round(f * their number) are visited once more, drawn anew for each epoch.

    Returns:
        Dataset indices, int64 [M]; M is the same for every epoch.
    """
    order = np.arange(num_examples)
    if copies is not None:
        order = np.repeat(order, _counts(np.asarray(copies, dtype=np.float64), seed, epoch))
    return np.random.default_rng([seed, epoch]).permutation(order) if shuffle else order


def _counts(copies: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often this epoch visits each example, int64 [N]."""
    if not (np.isfinite(copies).all() and (copies > 0).all()):
        raise ValueError(f"copies: expected numbers above 0, got {copies[~(copies > 0)][:3]}")
    counts = np.floor(copies).astype(np.int64)
    for number, value in enumerate(np.unique(copies)):
        if fraction := value % 1:
            members = np.flatnonzero(copies == value)
            drawn = np.random.default_rng([seed, epoch, number]).permutation(members)
            counts[drawn[: round(fraction * len(members))]] += 1
    return counts


def split_step(indices: Sequence[int], lengths: np.ndarray, parts: int) -> list[list[int]]:
    """Splits one step's examples in `parts` groups of near-equal token load (longest first, to the least loaded).

    Ties are broken by example count, then by part number, so the result is deterministic. Within a part the
    examples keep the order that they have in `indices`.
    """
    return [[int(indices[place]) for place in group] for group in _split_places(indices, lengths, parts)]


def _split_places(indices: Sequence[int], lengths: np.ndarray, parts: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for place in sorted(range(len(indices)), key=lambda i: (-int(lengths[indices[i]]), i)):
        load, count, part = heapq.heappop(heap)
        groups[part].append(place)
        heapq.heappush(heap, (load + int(lengths[indices[place]]), count + 1, part))
    return [sorted(group) for group in groups]


def plan_epoch(
    lengths: np.ndarray,
    trained_weights: np.ndarray,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    parts: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    copies: np.ndarray | None = None,
) -> EpochPlan:
    """Plans one epoch.

    Args:
        lengths: Unique tokens of each example, int [N].
        trained_weights: Sum of the weights of each example's scored tokens, float [N].
        batch_size: Examples of an optimizer step, over all ranks and micro-batches; the last step of the epoch
            may hold fewer.
        max_tokens: Instead of `batch_size`: unique tokens of an optimizer step, over all ranks and micro-batches; a
            step holds what fits, and at least one example. Shuffled examples are packed best-fit, `WINDOW` at a time
            (arXiv:2404.10830); in file order a step holds as many as fit.
        parts: Ranks x micro-batches that share a step.
        shuffle: Whether the order is a permutation drawn from (seed, epoch).
        seed: Of the permutation.
        epoch: Of the permutation.
        copies: How often the epoch visits each example, float [N]; None = once. See `epoch_order`.

    Returns:
        The steps. With `max_tokens` their number may differ from epoch to epoch.

    Raises:
        ValueError: A size is out of range, or there is nothing to visit.
    """
    if (batch_size is None) == (max_tokens is None):
        raise ValueError(f"batch_size and max_tokens: expected one of them, got {batch_size} and {max_tokens}")
    if min(batch_size or max_tokens or 0, parts) < 1:
        raise ValueError(
            f"batch_size (or max_tokens) and parts: expected at least 1, got {batch_size or max_tokens} and {parts}"
        )
    order = epoch_order(len(lengths), shuffle=shuffle, seed=seed, epoch=epoch, copies=copies)
    if len(lengths) and not len(order):
        raise ValueError(f"an epoch visits none of the {len(lengths)} examples: their weights are too small")
    if batch_size is not None:
        bounds = np.append(np.arange(0, len(order), batch_size), len(order))
    elif shuffle:
        order, bounds = _best_fit(order, lengths, int(max_tokens or 0), seed, epoch)
    else:
        bounds = _bounds_by_tokens(lengths[order], int(max_tokens or 0))
    return EpochPlan(order, bounds, lengths, trained_weights, parts)


def _best_fit(
    order: np.ndarray, lengths: np.ndarray, max_tokens: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The order rearranged so that steps are as full as can be, int64 [M], and the steps' bounds, int64 [steps + 1].

    Examples stay within the window that chance has put them in, and a window's steps follow each other by chance, so
    that which examples meet, and when, differs from epoch to epoch.
    """
    steps: list[np.ndarray] = []
    for number, start in enumerate(range(0, len(order), WINDOW)):
        window = order[start : start + WINDOW]
        filled = _fill(lengths[window], max_tokens)
        turn = np.random.default_rng([seed, epoch, number]).permutation(len(filled))
        steps += [window[sorted(filled[step])] for step in turn]
    return np.concatenate(steps), np.cumsum([0, *(len(step) for step in steps)])


def _fill(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Places of the examples in steps: the longest first, each into the step that it leaves the least room in."""
    steps: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens left, number of the step; sorted
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        at = bisect_left(rooms, (length, 0))
        if at == len(rooms):
            left, step = max_tokens, len(steps)
            steps.append([])
        else:
            left, step = rooms.pop(at)
        steps[step].append(place)
        insort(rooms, (max(left - length, 0), step))
    return steps


def _bounds_by_tokens(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Bounds of steps that hold as many of the ordered examples as fit, int64 [steps + 1]."""
    stops, bounds = np.cumsum(lengths, dtype=np.int64), [0]
    while bounds[-1] < len(lengths):
        before = stops[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(int(np.searchsorted(stops, before + max_tokens, side="right")), bounds[-1] + 1))
    return np.array(bounds)


def plan_step(indices: np.ndarray, lengths: np.ndarray, trained_weights: np.ndarray, parts: int) -> list[MicroPlan]:
    """Plans one optimizer step: its examples, given by `indices`, in `parts` micro-batches with the step's totals."""
    totals = StepTotals(tokens=float(np.sum(trained_weights[indices], dtype=np.float64)), examples=float(len(indices)))
    repeats = _repeats(indices)
    return [
        MicroPlan(tuple(int(indices[p]) for p in places), totals, tuple(repeats[p] for p in places))
        for places in _split_places(indices, lengths, parts)
    ]


def _repeats(indices: np.ndarray) -> list[int]:
    seen: Counter[int] = Counter()
    numbers = []
    for index in indices.tolist():
        numbers.append(seen[index])
        seen[index] += 1
    return numbers
