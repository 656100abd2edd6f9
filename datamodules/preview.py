"""What the model will see: the first examples of an epoch, taken out of the micro-batches that are really made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from datamodules.checking import planned_loader
from datamodules.examples import Examples
from datamodules.formats import Place, resolve
from datamodules.lengths import PAIR
from datamodules.roles import records_at, roles_of
from datamodules.streaming import stream_loader
from datamodules.views import ExampleView, Part, Preview, parts_of
from lit_align.batch import MicroBatch, MicroPlan, PromptBatch

if TYPE_CHECKING:
    from datamodules.base import AlignDataModule

SPLITS = ("train", "validation", "test", "predict")


@dataclass(frozen=True)
class Planned:
    """A micro-batch that a run would make.

    Attributes:
        examples: What its plan numbers.
        micro: Its plan.
        where: In words, where in the epoch it stands.
    """

    examples: Examples
    micro: MicroPlan
    where: str


def preview(data: AlignDataModule, n: int, split: str, *, world_size: int, micro_batches: int) -> Preview:
    """The first examples of the first epoch, in the order of the micro-batches; see `Inspection.preview`."""
    if n < 1:
        raise ValueError(f"n: expected at least 1 example, got {n}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    opened, source = _opened(data, split)
    if data.streaming and split == "train":
        plans, of = _streamed(opened, world_size * micro_batches), ""
    else:
        plans, of = _planned(opened, split, world_size, micro_batches), f" of {len(opened.datasets[split])}"
    views = _with_roles(opened, source, list(islice(_views(opened, plans), n)))
    what = f"first {len(views)}{of} examples in the order of the first epoch"
    return Preview(
        f"data preview: {type(data).__name__}, {split}, {what}",
        opened.report.warnings,
        views,
    )


def _opened(data: AlignDataModule, split: str) -> tuple[AlignDataModule, str]:
    """A copy of the data module with this split alone, set up as for a run, and the source that it comes from."""
    held_out = isinstance(data.sources["validation"], (int, float))
    source = "train" if split == "validation" and held_out else split
    if data.sources[source] is None:
        raise ValueError(f"{type(data).__name__}: no {split} data; give data.{split} = a file, a folder or an id")
    opened = copy(data)
    opened.sources = {
        name: spec if name == source or (source == "train" and held_out and name == "validation") else None
        for name, spec in data.sources.items()
    }
    opened._prepared = {}
    opened.setup(None)
    return opened, source


def _planned(data: AlignDataModule, split: str, world_size: int, micro_batches: int) -> Iterator[Planned]:
    """The micro-batches of the first epoch, those of all ranks of a step one after the other."""
    plan = planned_loader(data, split, world_size, micro_batches).plan(0)
    for number, step in enumerate(plan, start=1):
        for part, micro in enumerate(step, start=1):
            where = f"step {number} of {len(plan)}, micro-batch {part} of {len(step)}"
            yield Planned(data.datasets[split], micro, where)


def _streamed(data: AlignDataModule, parts: int) -> Iterator[Planned]:
    """The same for training data that is streamed, window by window."""
    made: list[Examples] = []

    def examples(rows: Any, chosen: Any) -> Examples:
        made.append(data.examples(rows, chosen))
        return made[-1]

    # Alone in the world, with the micro-batches of all ranks as its own, it hands out the plans instead of batches.
    stream = replace(stream_loader(data).stream, world_size=1, rank=0, micro_batches=parts)
    stream.examples, stream.collate = examples, lambda _, micro: micro
    for number, item in enumerate(stream):
        if isinstance(item, Exception):
            raise item
        if item.batch is None:  # the epoch is over
            return
        where = f"step {number // parts + 1}, micro-batch {number % parts + 1} of {parts}, window {len(made)}"
        yield Planned(made[-1], item.batch, where)


def _views(data: AlignDataModule, plans: Iterator[Planned]) -> Iterator[ExampleView]:
    """The examples of the micro-batches, laid out as in a run; without roles."""
    collate = data.collate()
    for planned in plans:
        examples, micro = planned.examples, planned.micro
        if not micro.indices:
            continue
        batch = collate([examples[index] for index in micro.indices], micro)
        names = ["chosen", "rejected"] if set(PAIR) <= set(examples.rows.table.column_names) else ["sequence"]
        for k, index in enumerate(micro.indices):
            prefix = len(getattr(examples[index], "prefix_ids", ()))
            parts = tuple(parts_of(batch, k, names, prefix, data.tokenizer))
            values = {name: float(numbers[k]) for name, numbers in getattr(batch, "values", {}).items()}
            yield ExampleView(index, examples.origin(index), f"{planned.where}: {_about(batch, micro)}", values, parts)


def _about(batch: MicroBatch | PromptBatch, micro: MicroPlan) -> str:
    if isinstance(batch, PromptBatch):
        return f"{len(batch)} prompts to be answered"
    rows, columns = batch.input_ids.shape
    form = "in one packed row" if batch.segments is not None else f"in {rows} rows of {columns} columns, padded"
    step = f"step divides by {micro.totals.tokens:g} (trained weight) or {micro.totals.examples:g} (examples)"
    return f"{batch.num_examples} examples, {batch.num_tokens} tokens {form}, {len(batch.scored)} scored; the {step}"


def _with_roles(data: AlignDataModule, source: str, views: Sequence[ExampleView]) -> tuple[ExampleView, ...]:
    """The same views with the roles of their tokens, as far as they are known."""
    encoder: Any = data.encoder()
    template = getattr(encoder, "template", None)
    # The files are read once more, for rows do not hold what the messages were.
    records = records_at(resolve(data.sources[source]), [view.origin for view in views]) if template else {}

    def roles(view: ExampleView, part: Part) -> list[str]:
        if template is None:
            end = data.tokenizer.eos_token_id
            return ["end of document" if token.id == end else "text" for token in part.tokens]
        if view.origin in records and part.name in ("prompt", "sequence"):
            ids, place = [token.id for token in part.tokens], Place(view.origin)
            return roles_of(template, encoder.columns, records[view.origin], ids, place)
        return ["" if part.name == "sequence" else part.name] * len(part.tokens)

    return tuple(replace(view, parts=tuple(_named(part, roles(view, part)) for part in view.parts)) for view in views)


def _named(part: Part, roles: Sequence[str]) -> Part:
    tokens = tuple(replace(token, role=role) for token, role in zip(part.tokens, roles, strict=True))
    return replace(part, tokens=tokens)
