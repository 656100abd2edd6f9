"""How long examples are, and what it costs to compute a batch of them in each layout; counted, never estimated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datamodules.rows import Rows

if TYPE_CHECKING:
    from lit_align.batch.plan import EpochPlan


PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Spread:
    """Five of some lengths, each a length that occurs, in tokens.

    Attributes:
        minimum: The shortest.
        p50: The shortest that is at least as long as half of them; the same for 90 and 99 percent.
        p90: See `p50`.
        p99: See `p50`.
        maximum: The longest.
    """

    minimum: int
    p50: int
    p90: int
    p99: int
    maximum: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Spread:
        """The spread of at least one length."""
        marks = np.percentile(lengths, (0, 50, 90, 99, 100), method="inverted_cdf")
        return cls(*(int(mark) for mark in marks))


def named_lengths(columns: dict[str, np.ndarray], max_length: int | None) -> dict[str, np.ndarray]:
    """Lengths of each kind of text that an example has, by its name for people.

    Args:
        columns: Lengths by column of ids, int64 [N] each.
        max_length: Budget of an example; None = records are documents, which are joined and cut in blocks.

    Returns:
        int64 [N] each. Of pairs also the prompt with the longer answer, which is what the budget counts.
    """
    if set(columns) == set(PAIR):
        prompt, chosen, rejected = (columns[name] for name in PAIR)
        together = prompt + np.maximum(chosen, rejected)
        return {
            "pair": prompt + chosen + rejected,
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "prompt+longer": together,
        }
    other = "document" if max_length is None else "example"
    return {name.removesuffix("_ids") if name != "input_ids" else other: sizes for name, sizes in columns.items()}


def counted_lengths(columns: dict[str, np.ndarray]) -> np.ndarray:
    """What `max_length` is compared with, int64 [N]."""
    if set(columns) == set(PAIR):
        return columns["prompt_ids"] + np.maximum(columns["chosen_ids"], columns["rejected_ids"])
    return np.sum(list(columns.values()), axis=0)


def sequence_lengths(rows: Rows, chosen: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens of each sequence of each example with its prefix before it, int64 [N, S].

    Args:
        rows: Tokenised rows.
        chosen: Rows of the examples.
        lengths: Unique tokens of each example, int64 [N].
    """
    if not set(PAIR) <= set(rows.table.column_names):
        return lengths[:, None]
    prompt, *answers = (rows.ragged(name).lengths[chosen] for name in PAIR)
    return np.stack([prompt + answer for answer in answers], axis=1)


@dataclass(frozen=True)
class PlanCost:
    """What the micro-batches of one epoch, of all ranks, cost in each layout.

    Attributes:
        steps: Optimizer steps of the epoch (eval splits: batches).
        parts: Micro-batches of a step, over all ranks.
        examples: Examples of the largest step.
        useful: Unique tokens of all examples, as often as they are visited.
        packed: Tokens that packed rows compute; a micro-batch without example computes one.
        padded: Tokens that padded rectangles compute.
        repeated: Tokens among the padded ones that are prompts computed once more.
        largest_packed: Tokens of the largest packed micro-batch.
        largest_padded: Tokens of the largest padded micro-batch.
    """

    steps: int
    parts: int
    examples: int
    useful: int
    packed: int
    padded: int
    repeated: int
    largest_packed: int
    largest_padded: int


def plan_cost(plan: EpochPlan, sequences: np.ndarray) -> PlanCost:
    """Goes through the micro-batches of a plan and counts.

    Args:
        plan: The steps of an epoch.
        sequences: See `sequence_lengths`.
    """
    useful, packed, padded, rows = [], [], [], sequences.shape[1]
    for micro in _micro_batches(plan):
        tokens = int(plan.lengths[micro].sum())
        useful.append(tokens)
        packed.append(max(tokens, 1))
        padded.append(max(len(micro) * rows, 1) * int(sequences[micro].max(initial=1)))
    visits = np.bincount(plan.order, minlength=len(plan.lengths))
    return PlanCost(
        steps=len(plan),
        parts=plan.parts,
        examples=int(np.diff(plan.bounds).max()),
        useful=sum(useful),
        packed=sum(packed),
        padded=sum(padded),
        repeated=int(((sequences.sum(axis=1) - plan.lengths) * visits).sum()),
        largest_packed=max(packed),
        largest_padded=max(padded),
    )


def _micro_batches(plan: EpochPlan) -> Iterable[np.ndarray]:
    for step in plan:
        for micro in step:
            yield np.array(micro.indices, dtype=np.int64)
