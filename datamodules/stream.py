"""A stream of training data: raw records in windows, tokenised in memory, planned, and laid out without end.

The raw records of all sources, one after the other, are cut in windows. A window is tokenised by the very encoder and
guard of `store`, and planned like an epoch of its own; its last step may hold fewer examples, and blocks of text end
with it. After the last window the next epoch begins. The cursor says where a window begins among the raw records, so
going on from it means reading over what was seen, without tokenising it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from datamodules.examples import Examples
from datamodules.formats import DataError, RawRecord, Source, read
from datamodules.formats.errors import SHOWN_FAULTS
from datamodules.report import SplitReport
from datamodules.rows import Rows
from datamodules.store import Guard, features_of, keep, nothing_left, without_progress_bar
from lit_align.batch.plan import EpochPlan, plan_epoch

WINDOW_CHARACTERS = 1 << 26
"""A window ends earlier when its text is longer than this, so that long documents do not fill the memory."""

START = {"epoch": 0, "window": 0, "record": 0, "step": 0}
"""The cursor of a stream: its epoch, the window's number, the raw records before the window, the step in it."""


@dataclass(frozen=True)
class Item:
    """What the stream hands to the loader.

    Attributes:
        batch: A micro-batch; None = the epoch is over.
        after: The cursor once it was handed out; None = its step is not complete yet.
        report: What became of the records that were read for it; None = none were.
    """

    batch: Any
    after: dict[str, int] | None
    report: SplitReport | None


@dataclass(frozen=True)
class Window:
    """Consecutive raw records.

    Attributes:
        number: In the epoch, from 0.
        record: Raw records of the epoch before it.
        raw: Its records.
        faults: Of the files that were opened to read them.
    """

    number: int
    record: int
    raw: list[RawRecord]
    faults: list[DataError]


@dataclass
class Stream(IterableDataset):
    """This rank's micro-batches from a cursor on, without end; the trainer or one process of the loader iterates it.

    Attributes:
        sources: Where to read.
        guard: Tokenises a record.
        examples: Makes examples from rows and the numbers of the chosen ones.
        collate: Makes a micro-batch from (examples, plan of the micro-batch).
        size: The size of a step, "batch_size" or "max_tokens".
        window: Raw records of a window.
        rank: This process.
        world_size: Processes that share each step; all of them read the whole stream.
        micro_batches: Micro-batches that each process accumulates for a step.
        seed: Of the order within windows.
        start: The cursor to begin at.
    """

    sources: Sequence[Source]
    guard: Guard
    examples: Callable[[Rows, np.ndarray], Examples]
    collate: Callable[[list, Any], Any]
    size: dict[str, int | None]
    window: int
    rank: int
    world_size: int
    micro_batches: int
    seed: int
    start: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Item | Exception]:
        try:
            yield from self._items(dict(self.start or START))
        except ValueError as error:  # handed over as it is: a loader's process would make another error of it
            yield error

    def _items(self, at: dict[str, int]) -> Iterator[Item]:
        while True:
            count, empty = SplitReport(), at["record"] == 0
            for window in self._windows(at["window"], at["record"]):
                examples = self._tokenised(window, count)
                if examples is not None:
                    yield from self._steps(window, examples, at["epoch"], at["step"], count)
                    count, empty = SplitReport(), False
                at["step"] = 0
            if empty:
                raise ValueError(nothing_left(self.sources, count))
            at = {**START, "epoch": at["epoch"] + 1}
            yield Item(None, dict(at), count)

    def _steps(
        self, window: Window, examples: Examples, epoch: int, first: int, report: SplitReport | None
    ) -> Iterator[Item]:
        """The window's micro-batches from a step on; the first one carries the report."""
        plan = self._plan(window, examples, epoch)
        here = {"epoch": epoch, "window": window.number, "record": window.record}
        beyond = {"epoch": epoch, "window": window.number + 1, "record": window.record + len(window.raw), "step": 0}
        for step in range(first, len(plan)):
            parts = plan[step][self.rank :: self.world_size]
            for number, part in enumerate(parts, start=1):
                after = None if number < len(parts) else {**here, "step": step + 1} if step + 1 < len(plan) else beyond
                yield Item(self.collate([examples[index] for index in part.indices], part), after, report)
                report = None

    def _plan(self, window: Window, examples: Examples, epoch: int) -> EpochPlan:
        """The window's steps, a function of (seed, epoch, window)."""
        seed = int(np.random.SeedSequence([self.seed, window.number]).generate_state(1, np.uint64)[0])
        return plan_epoch(
            examples.lengths,
            examples.trained_weights,
            **self.size,
            parts=self.world_size * self.micro_batches,
            shuffle=True,
            seed=seed,
            epoch=epoch,
        )

    def _windows(self, number: int, record: int) -> Iterator[Window]:
        """The windows of an epoch from one on; what stands before it is read and left alone."""
        faults: list[DataError] = []

        def on_fault(error: DataError) -> None:
            if self.guard.refuses(error):
                raise error
            faults.append(error)

        records = read(self.sources, on_fault, pieces=self.guard.encoder.pieces, streaming=True)
        for _ in islice(records, record):
            pass
        faults.clear()
        while raw := _cut(records, self.window):
            yield Window(number, record, raw, list(faults))
            number, record = number + 1, record + len(raw)
            faults.clear()
        if faults:
            yield Window(number, record, [], faults)

    def _rows(self, raw: list[RawRecord], report: SplitReport) -> Rows | None:
        """The rows of records without fault, in memory; None = there are none."""
        import datasets

        if not raw:
            return None
        made, columns = [self.guard(vars(record)) for record in raw], self.guard.columns
        values = {name: [row[name] for row in made] for name in columns}
        kept = keep(datasets.Dataset.from_dict(values, features_of(columns)), self.guard, report)
        with without_progress_bar():
            # Rows read the table itself, which a selection leaves as it was.
            return Rows(kept.flatten_indices(keep_in_memory=True)) if len(kept) else None

    def _tokenised(self, window: Window, count: SplitReport) -> Examples | None:
        """The window's examples, counted; None = there are none."""
        made, raw = SplitReport(records=len(window.raw) + len(window.faults)), list(window.raw)
        for fault in window.faults:
            made.add(fault)
        if raw and raw[-1].continues:  # the piece gets an end, which is left out at the end of the window's text
            raw[-1] = replace(raw[-1], continues=False)
        rows = self._rows(raw, made)
        examples = self.examples(rows, np.arange(len(rows))) if rows is not None else None
        if examples is not None and len(examples):
            made.examples, made.tokens = len(examples), int(examples.lengths.sum())
            made.trained = float(examples.trained_weights.sum())
        add_counts(count, made)
        return examples if made.examples else None


def _cut(records: Iterator[RawRecord], window: int) -> list[RawRecord]:
    """The records of the next window."""
    raw, size = [], 0
    for record in records:
        raw.append(record)
        size += len(record.text)
        if len(raw) == window or size >= WINDOW_CHARACTERS:
            break
    return raw


def add_counts(total: SplitReport, part: SplitReport) -> None:
    """Adds the counts of a part to those of the whole."""
    for name in ("records", "examples", "tokens", "trained", "skipped", "dropped", "cut"):
        setattr(total, name, getattr(total, name) + getattr(part, name))
    total.faults = [*total.faults, *part.faults][:SHOWN_FAULTS]
