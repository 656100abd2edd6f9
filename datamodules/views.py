"""Examples taken out of a batch, token by token, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from datamodules.pieces import token_texts
from lit_align.batch import MicroBatch, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Token:
    """One token of an example.

    Attributes:
        id: Its number in the vocabulary.
        text: What it adds to the text.
        role: Whose it is, or which answer's; empty = not known.
        position: The position that the model is told.
        place: Column in its row of the batch.
        weight: Loss weight; 0 = seen, not trained.
    """

    id: int
    text: str
    role: str
    position: int
    place: int
    weight: float


@dataclass(frozen=True)
class Part:
    """A stretch of one row of the batch that belongs together.

    Attributes:
        name: What it is: "prompt", "chosen", "rejected", "sequence".
        row: Row of the batch.
        start: Its first column.
        stop: The column after its last.
        prefix: Columns (start, stop) of the prefix that it attends to beside itself; None = no other.
        tokens: Its tokens.
    """

    name: str
    row: int
    start: int
    stop: int
    prefix: tuple[int, int] | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class ExampleView:
    """One example as it lies in its batch.

    Attributes:
        index: Its number in the split.
        origin: Where its record stands, "file:line".
        batch: In words, which batch it lies in.
        values: Numbers of the example as a whole ("margin", "weight").
        parts: Its stretches.
    """

    index: int
    origin: str
    batch: str
    values: dict[str, float]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Preview:
    """The first examples of an epoch, for terminals and for browsers.

    Attributes:
        title: What is shown.
        warnings: What a user should know about the data.
        examples: The examples.
    """

    title: str
    warnings: list[str] = field(default_factory=list)
    examples: tuple[ExampleView, ...] = ()

    def text(self, color: bool = False, width: int = 100) -> str:
        """For a terminal; with `color` trained tokens are coloured, without it they stand between signs.

        Args:
            color: Whether ANSI codes may be used.
            width: Columns of a line.
        """
        from datamodules.preview_text import as_text

        return as_text(self, color, width)

    def html(self) -> str:
        """One page that needs no other file."""
        from datamodules.preview_html import as_html

        return as_html(self)


def parts_of(
    batch: MicroBatch | PromptBatch, k: int, names: Sequence[str], prefix: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Part]:
    """The stretches of a batch's k-th example; their tokens have no roles yet.

    Args:
        batch: As the model gets it.
        k: Which of its examples.
        names: Of the example's branches.
        prefix: Tokens of its prefix.
        tokenizer: For the texts.
    """
    if isinstance(batch, PromptBatch):
        ids = batch.prompt_ids[k].tolist()
        texts = token_texts(tokenizer, ids)
        tokens = (Token(i, text, "", at, at, 0.0) for at, (i, text) in enumerate(zip(ids, texts, strict=True)))
        yield Part("prompt", k, 0, len(ids), None, tuple(tokens))
        return
    shown: set[tuple[int, int, int]] = set()
    for sequence, name in zip(batch.groups[k].tolist(), names, strict=True):
        row, start, stop, before = _stretch(batch, sequence, prefix)
        if before is not None and (row, *before) not in shown:  # a packed row holds it once
            shown.add((row, *before))
            yield Part("prompt", row, *before, None, _tokens(batch, row, before, {}, tokenizer))
        weights = _weights(batch, sequence, row, start)
        yield Part(name, row, start, stop, before, _tokens(batch, row, (start, stop), weights, tokenizer))


def _stretch(batch: MicroBatch, sequence: int, prefix: int) -> tuple[int, int, int, tuple[int, int] | None]:
    """Row, start and stop of a sequence without its prefix, and where that prefix lies."""
    row, last = divmod(int(batch.ends[sequence]), batch.input_ids.shape[1])
    stop = last + 1
    if batch.segments is not None:
        segment = next(s for s in batch.segments if s.stop == stop)
        before = (segment.prefix_start, segment.prefix_stop)
        return row, segment.start, stop, before if before[1] > before[0] else None
    assert batch.attention_mask is not None
    first = stop - int(batch.attention_mask[row].sum())
    return row, first + prefix, stop, (first, first + prefix) if prefix else None


def _weights(batch: MicroBatch, sequence: int, row: int, start: int) -> dict[int, float]:
    """Weight of each scored token of a sequence, by its column."""
    scored, columns = batch.scored, batch.input_ids.shape[1]
    rows = (scored.sequences == sequence).nonzero()[:, 0].tolist()
    sources = [int(scored.sources[i]) - row * columns for i in rows]
    # What a prefix's last token predicts is the first token of the branch, wherever in the row the branch lies.
    places = [source + 1 if source >= start else start for source in sources]
    return {place: float(scored.weights[i]) for place, i in zip(places, rows, strict=True)}


def _tokens(
    batch: MicroBatch,
    row: int,
    span: tuple[int, int],
    weights: dict[int, float],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Token, ...]:
    ids = batch.input_ids[row, slice(*span)].tolist()
    positions = batch.position_ids[row, slice(*span)].tolist()
    texts = token_texts(tokenizer, ids)
    places = range(*span)
    return tuple(
        Token(number, text, "", position, place, weights.get(place, 0.0))
        for number, text, position, place in zip(ids, texts, positions, places, strict=True)
    )
