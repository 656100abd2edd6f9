"""What an epoch of training holds, in numbers alone: for who plans a run and does not start it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.checking import laid_out, planned_loader, without_report
from datamodules.examples import Examples
from datamodules.formats import FileSource, resolve
from datamodules.lengths import sequence_lengths
from datamodules.store import entry_of

if TYPE_CHECKING:
    from datamodules.base import AlignDataModule

CHEAP = 2**25
"""Bytes of files that are tokenised only to be counted; of more, the cache is asked alone."""
LOOKED_AT = 20_000
"""Micro-batches of the epoch among which the largest is sought."""


@dataclass(frozen=True)
class TrainCost:
    """Training data of the first epoch, as the step plan splits it.

    Attributes:
        steps: Optimizer steps (of prompts: rollouts).
        examples: Examples that are visited.
        sequences: Their branches.
        tokens: Unique tokens.
        scored: Scored tokens, by their weights; 0 for prompts.
        attended: (query, key) pairs of causal attention, as `lit_align.batch.Work` counts them.
        largest_tokens: Positions that the layout computes in the largest micro-batch.
        largest_scored: Scored tokens of the micro-batch with the most of them.
        longest: Unique tokens of the longest example.
        longest_scored: Scored tokens of the example with the most of them.
    """

    steps: int
    examples: int
    sequences: int
    tokens: int
    scored: float
    attended: float
    largest_tokens: int
    largest_scored: float
    longest: int
    longest_scored: float


def train_cost(data: AlignDataModule, *, world_size: int, micro_batches: int) -> TrainCost | None:
    """Counts the first epoch; tokenises into the cache what is small, and is not there yet.

    Args:
        data: What a run would take; it stays as it is.
        world_size: Ranks that would share each step.
        micro_batches: Micro-batches that each rank would accumulate.

    Returns:
        None where the data is streamed, or not tokenised and too large (or too far away) to be so now.

    Raises:
        ValueError: There is no training data.
    """
    data._needed("fit")  # refuses what a run would
    if data.streaming or not _is_cheap(data):
        return None
    opened = copy(data)
    held_out = isinstance(data.sources["validation"], (int, float))
    opened.sources = {s: spec for s, spec in data.sources.items() if s == "train" or (s == "validation" and held_out)}
    opened.sources = dict.fromkeys(data.sources) | opened.sources
    opened._prepared, opened.datasets = {}, {}
    with without_report():
        opened.setup("fit")
    return _counted(opened, world_size, micro_batches)


def _is_cheap(data: AlignDataModule) -> bool:
    sources = resolve(data.sources["train"])
    files = [source for source in sources if isinstance(source, FileSource)]
    if len(files) == len(sources) and sum(Path(file.path).stat().st_size for file in files) <= CHEAP:
        return True
    if len(files) < len(sources):
        return False  # even to name them the library would fetch them
    folder, _ = entry_of(sources, data.encoder(), data.tokenizer, data.on_error, data.cache_dir)
    return (folder / "report.json").is_file()


def _counted(data: AlignDataModule, world_size: int, micro_batches: int) -> TrainCost:
    examples = data.datasets["train"]
    plan = planned_loader(data, "train", world_size, micro_batches).plan(0)
    lengths, scored = np.asarray(examples.lengths), np.asarray(examples.trained_weights)
    sequences = _sequences(examples, lengths)
    visits = np.bincount(plan.order, minlength=len(lengths))
    prefix = sequences.sum(1) - lengths if sequences.shape[1] > 1 else np.zeros_like(lengths)
    own = sequences - prefix[:, None]
    attended = prefix**2 / 2 + (prefix[:, None] * own + own**2 / 2).sum(1)
    tokens, most = [0], [0.0]
    for step in range(min(len(plan), max(LOOKED_AT // plan.parts, 1))):
        for micro in plan[step]:
            chosen = np.array(micro.indices, dtype=np.int64)
            padded = len(chosen) * sequences.shape[1] * int(sequences[chosen].max(initial=0))
            tokens.append(padded if data.layout == "padded" else int(lengths[chosen].sum()))
            most.append(float(scored[chosen].sum()))
    return TrainCost(
        steps=len(plan),
        examples=int(visits.sum()),
        sequences=int(visits.sum()) * sequences.shape[1],
        tokens=int((lengths * visits).sum()),
        scored=float((scored * visits).sum()),
        attended=float((attended * visits).sum()),
        largest_tokens=max(tokens),
        largest_scored=max(most),
        longest=int(lengths.max()),
        longest_scored=float(scored.max()),
    )


def _sequences(examples: Examples, lengths: np.ndarray) -> np.ndarray:
    """Tokens of each sequence with its prefix, int64 [N, S]."""
    if not laid_out(examples):
        return lengths[:, None]
    return sequence_lengths(examples.rows, examples.chosen, lengths)
