"""Checks the data of a run before it starts: every record is read, every fault is named, every number is counted."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.check_report import CheckReport, SplitCheck
from datamodules.examples import Examples
from datamodules.formats import FileSource, Source, resolve
from datamodules.lengths import PAIR, Spread, counted_lengths, named_lengths, plan_cost, sequence_lengths
from datamodules.measuring import WHOLE, Measured, measure, some_of_each
from datamodules.store import Tokenised, cache_folder
from lit_align.batch import Example, PlannedLoader

if TYPE_CHECKING:
    from datamodules.base import AlignDataModule
    from datamodules.templates import ChatTemplate

SHOWN_REPEATS = 3
"""Repeated examples that a warning names; all are counted."""


def check(data: AlignDataModule, *, limit: int, world_size: int, micro_batches: int) -> CheckReport:
    """Reads and tokenises all sources of a data module in a folder that is gone afterwards, and counts.

    Args:
        data: What a run would take; it stays as it is.
        limit: Faults to tell in full; all are counted.
        world_size: Ranks that would share each step.
        micro_batches: Micro-batches that each rank would accumulate for a training step.

    Raises:
        ValueError: The configuration is wrong: no source, a source that is not there, a tokenizer that cannot serve.
    """
    if limit < 0:
        raise ValueError(f"limit: expected at least 0, got {limit}")
    sources = _sources(data)
    encoder = data.encoder()
    template = getattr(encoder, "template", None)
    report = CheckReport(
        name=type(data).__name__,
        on_error=data.on_error,
        overlong=encoder.overlong,
        template=[] if template is None else _about(template),
    )
    root = cache_folder(data.cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checking-", dir=root) as folder:
        measured = {
            split: measure(found, encoder, Path(folder), limit=limit, num_proc=data.num_proc, name=split)
            for split, found in sources.items()
        }
        opened = _opened(data, measured, report)
        for split in dict.fromkeys((*measured, *opened.datasets)):
            made = _split(opened, split, measured, template, world_size, micro_batches)
            report.splits[split] = made
            made.source = _told(sources[split]) if split in sources else ""
    report.warnings += opened.report.warnings
    if data.streaming:
        note = f"a run plans it in windows of {data.stream_window} records, this check as one epoch of all of them"
        report.warnings.append(f"the training data is streamed: {note}")
    if template is not None:
        report.warnings += [text for text in template.warnings() if text not in report.warnings]
    for found in measured.values():
        report.reasons += found.reasons
    split_of = {id(fault): split for split, found in measured.items() for fault in found.faults}
    shown = some_of_each([fault for found in measured.values() for fault in found.faults], limit)
    report.faults = [(split_of[id(fault)], fault) for fault in shown]
    return report


def planned_loader(data: AlignDataModule, split: str, world_size: int, micro_batches: int) -> PlannedLoader:
    """The loader that rank 0 of a run has, for a data module without a trainer.

    Args:
        data: Set up.
        split: Which data.
        world_size: Ranks.
        micro_batches: Micro-batches that a rank accumulates for a training step.
    """
    loader = data.loader(split, shuffle=split == "train")
    loader.world_size = world_size
    if split == "train" and laid_out(data.datasets[split]):
        loader.micro_batches = micro_batches
    return loader


def laid_out(examples: Examples) -> bool:
    """Whether the examples are token trees that are laid out in micro-batches; prompts to be answered are not."""
    return len(examples) > 0 and isinstance(examples[0], Example)


def _sources(data: AlignDataModule) -> dict[str, tuple[Source, ...]]:
    given = {s: spec for s, spec in data.sources.items() if spec is not None and not isinstance(spec, (int, float))}
    if not given:
        raise ValueError(f"{type(data).__name__}: no data; give data.train = a file, a folder or an id")
    return {split: resolve(spec) for split, spec in given.items()}


def _opened(data: AlignDataModule, measured: dict[str, Measured], report: CheckReport) -> AlignDataModule:
    """A copy of the data module, set up with what was measured, in the way of a run."""
    usable = {split: found for split, found in measured.items() if found.rows is not None}
    report.problems += [
        f"the {split} data holds no record that can be used" for split in measured if split not in usable
    ]
    opened = copy(data)
    opened.streaming = False
    held_out = isinstance(data.sources["validation"], (int, float))
    opened.sources = {
        split: spec if split in usable or (held_out and split == "validation") else None
        for split, spec in data.sources.items()
    }
    # The rows of a check are never resumed from, so nothing but their form stands in for what identifies them.
    parts: dict[str, Any] = {"data": [], "settings": {}, "tokenizer": "", "version": 0}
    opened._prepared = {split: Tokenised(found.rows, found.report, parts) for split, found in usable.items()}  # type: ignore[arg-type]
    opened.datasets = {}
    try:
        with without_report():
            opened.setup(None)
    except ValueError as error:  # a share that cannot be held out, say
        report.problems.append(str(error))
    return opened


@contextmanager
def without_report() -> Iterator[None]:
    """`setup` logs what became of the records; a check says it itself."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _split(
    data: AlignDataModule,
    split: str,
    measured: dict[str, Measured],
    template: ChatTemplate | None,
    world_size: int,
    micro_batches: int,
) -> SplitCheck:
    found = measured.get(split)
    source = found or measured["train"]
    report = data.report.splits.get(split, source.report)
    made = SplitCheck(split, report, max_length=source.max_length)
    if split not in data.datasets or not len(data.datasets[split]):
        return made
    examples = data.datasets[split]
    columns = _whole_lengths(examples, found)
    made.spreads = {name: Spread.of(sizes) for name, sizes in named_lengths(columns, source.max_length).items()}
    if source.max_length is None:
        made.spreads["block"] = Spread.of(examples.lengths)
    else:
        made.too_long = int((counted_lengths(columns) > source.max_length).sum())
    made.repeats = _repeats(examples)
    made.untrained = int((examples.trained_weights == 0).sum()) if laid_out(examples) else 0
    made.ends = None if template is None else _trained_ends(examples, template.end_of_turn_id)
    plan = planned_loader(data, split, world_size, micro_batches).plan(0)
    made.steps, made.layout = len(plan), data.layout
    if laid_out(examples):
        made.cost = plan_cost(plan, sequence_lengths(examples.rows, examples.chosen, examples.lengths))
    return made


def _whole_lengths(examples: Examples, found: Measured | None) -> dict[str, np.ndarray]:
    """Lengths before `overlong` of the split's examples and of those that it leaves out, by column of ids."""
    columns = {}
    for name in examples.rows.table.column_names:
        if name.startswith(WHOLE):
            column = name.removeprefix(WHOLE)
            left_out = found.left_out[column] if found else np.zeros(0, dtype=np.int64)
            columns[column] = np.concatenate([examples.rows.numbers(name)[examples.chosen], left_out])
    return columns


def _repeats(examples: Examples) -> tuple[int, list[tuple[str, str]]]:
    """How many examples stood before, token for token; of the first few, where they and the earlier ones stand."""
    digests = examples.rows.numbers("digest")[examples.chosen]
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(digests)))
    places = [(int(examples.chosen[i]), int(examples.chosen[first[inverse[i]]])) for i in again[:SHOWN_REPEATS]]
    origin = examples.rows.text
    return len(again), [(origin("origin", row), origin("origin", before)) for row, before in places]


def _trained_ends(examples: Examples, end: int) -> tuple[int, int] | None:
    """In how many sequences the end-of-turn token is trained, and of how many; None = nothing is trained yet."""
    rows, names = examples.rows, examples.rows.table.column_names
    if "weights" in names:
        ids, weights = rows.ragged("input_ids"), rows.ragged("weights")
        hits = [bool((ids[row][weights[row] > 0] == end).any()) for row in examples.chosen]
    elif set(PAIR) <= set(names):
        answers = [rows.ragged(name) for name in PAIR[1:]]
        hits = [bool((answer[row] == end).any()) for answer in answers for row in examples.chosen]
    else:
        return None
    return sum(hits), len(hits)


def _about(template: ChatTemplate) -> list[str]:
    own = "the tokenizer's own" if template.own else "ChatML, for the tokenizer has none"
    lines = [f"{own}; an assistant's turn ends with {template.end_of_turn} (id {template.end_of_turn_id})"]
    try:
        template.check_prefix_preserving()
        lines.append("prefix-preserving: text stays as it is when more turns follow")
    except ValueError as error:
        lines.append(f"not prefix-preserving: {error}")
    return lines


def _told(sources: tuple[Source, ...]) -> str:
    names = [s.path if isinstance(s, FileSource) else f"{s.path}[{s.split}]" for s in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
