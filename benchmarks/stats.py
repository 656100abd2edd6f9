"""Arithmetic of the harness: percentiles, ratios, slopes, and the gate that comes before every number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tolerances:
    """Relative differences that the gate lets through.

    Attributes:
        loss: Of the first step's loss.
        norm: Of its gradient norm.
        curve: Of every later loss: rounding of two programs grows from step to step.
    """

    loss: float = 1e-4
    norm: float = 1e-3
    curve: float = 2e-3


TOLERANCES = {"float32": Tolerances(), "bfloat16": Tolerances(2e-3, 1e-2, 1e-2)}


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values; `share` in [0, 1]."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return percentile(values, 0.5)


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of cost ~ size^slope: least squares through the logarithms."""
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def difference(left: float, right: float) -> float:
    """Relative difference of two numbers, by the larger."""
    return abs(left - right) / max(abs(left), abs(right), 1e-12)


def gate(
    ours: dict[str, Any],
    peer: dict[str, Any],
    same_order: bool = True,
    tolerances: Tolerances = TOLERANCES["float32"],
) -> list[str]:
    """What keeps the peer's run from being compared with ours; empty = nothing.

    Args:
        ours: What our process measured: digests and losses of its steps, gradient norm of the first.
        peer: The same of the peer's.
        same_order: Whether both sides have the same examples in each step. If the peer makes up its own batches (by
            length, or packs), only the examples of the whole run can be the same, and are compared.
        tolerances: Of losses and gradient norm.
    """
    faults = []
    if ours["examples"] != peer["examples"]:
        faults.append("the two sides were given different token ids")
    if not all(math.isfinite(loss) for loss in (*ours["losses"], *peer["losses"])):
        faults.append("a loss is not finite")
    if not same_order:
        return faults
    if [step.get("digest") for step in ours["steps"]] != [step.get("digest") for step in peer["steps"]]:
        faults.append("the steps hold different examples")
    if len(ours["losses"]) != len(peer["losses"]):
        return [*faults, f"{len(ours['losses'])} losses here, {len(peer['losses'])} there"]
    for step, (left, right) in enumerate(zip(ours["losses"], peer["losses"], strict=True)):
        tolerance = tolerances.curve if step else tolerances.loss
        if difference(left, right) > tolerance:
            faults.append(f"loss of step {step}: {left:.6g} here, {right:.6g} there")
    if difference(ours["grad_norm"], peer["grad_norm"]) > tolerances.norm:
        faults.append(f"first gradient norm: {ours['grad_norm']:.6g} here, {peer['grad_norm']:.6g} there")
    return faults


def timed(run: dict[str, Any], warmup: int) -> dict[str, float]:
    """Totals of a run's timed steps, and what it did before the first step divided among them (see `extra_seconds`).

    `extra_seconds` is work that a run does once for all its examples (log-probabilities of a reference); each timed
    step pays for its own examples' share.
    """
    steps, seconds = run["steps"][warmup:], run["seconds"][warmup:]
    tokens = sum(step["tokens"] for step in steps)
    share = tokens / sum(step["tokens"] for step in run["steps"])
    total = sum(seconds) + run["extra_seconds"] * share
    return {
        "seconds": total,
        "seconds_without_extra": sum(seconds),
        "cpu_seconds": sum(run["cpu_seconds"][warmup:]),
        "tokens": tokens,
        "examples": sum(step["examples"] for step in steps),
        "tokens_per_second": tokens / total,
        "examples_per_second": sum(step["examples"] for step in steps) / total,
    }
