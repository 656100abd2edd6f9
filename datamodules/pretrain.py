"""Long text cut in blocks: the data of pre-training."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.base import AlignDataModule
from datamodules.dictionaries import language_dictionary
from datamodules.examples import Examples
from datamodules.formats import Place, parse_text
from datamodules.overlong import Overlong
from datamodules.rows import Rows
from datamodules.store import prompt_key
from lit_align.batch import Branch, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PretrainDataModule(AlignDataModule):
    """Plain text for pre-training: documents are joined, with the EOS token between them, and cut in blocks.

    A text file is one document; json, jsonl and parquet files hold one document a record, {"text": ...}. The last
    block may be shorter (a single left-over token, which nothing could predict, is left out). A fraction for
    `validation` is split off by document; of a single document, its last blocks are held out. No block holds text of
    sources of different weights.

    Args:
        block_size: Tokens of a block.
        **kwargs: See `AlignDataModule`.
    """

    def __init__(self, block_size: int = 1024, **kwargs: Any) -> None:
        super().__init__(max_length=block_size, overlong="truncate", **kwargs)
        self.block_size = block_size

    def encoder(self) -> TextEncoder:
        """Makes rows from documents."""
        return TextEncoder(self.tokenizer)

    def examples(self, rows: Rows, chosen: np.ndarray) -> BlockExamples:
        """The blocks of the chosen rows' text."""
        return BlockExamples(rows, chosen, self.block_size)

    def split(self, rows: Rows, fraction: float) -> tuple[Examples, Examples, str]:
        """Training and held-out blocks, and in words how they were split."""
        if len(np.unique(rows.numbers("key"))) > 1:
            train, held_out, note = super().split(rows, fraction)
            return train, held_out, note.replace("prompts", "documents")
        whole = self.examples(rows, np.arange(len(rows)))
        if len(whole) < 2:
            raise ValueError(
                f"validation: cannot split off a fraction of {fraction:g}, for the data is one document of one block; "
                "give a validation file, or a smaller block_size"
            )
        size = min(max(round(fraction * len(whole)), 1), len(whole) - 1)
        note = f"the last {fraction:g} of the blocks of the training data's only document"
        return whole[: len(whole) - size], whole[len(whole) - size :], note

    def dictionaries(self, indices: list[int], split: str = "train") -> dict[str, Any]:
        """Blocks as input_ids, attention_mask and labels (all tokens are trained), int64 tensors [B, T]."""
        return language_dictionary([self.datasets[split][i] for i in indices], self.collate(), None)


class BlockExamples(Examples):
    """Blocks of the text that lies in the chosen rows, end to end; nothing is copied before a block is asked for.

    Args:
        rows: Tokenised pieces of documents, each document's last one with EOS at its end.
        chosen: The rows to join.
        block_size: Tokens of a block.

    Attributes:
        starts: Where each block begins in the joined text, in tokens, int64 [N].
    """

    def __init__(self, rows: Rows, chosen: np.ndarray, block_size: int) -> None:
        copies = rows.copies(chosen)
        weights = np.ones(len(chosen)) if copies is None else copies
        # No block holds text of two weights, so text of equal weight stands together.
        order = np.argsort(weights, kind="stable")
        super().__init__(rows, chosen[order])
        self.block_size = block_size
        self._stops = np.cumsum(rows.ragged("input_ids").lengths[self.chosen])
        cuts = [_cut(text, self._stops, block_size) for text in _texts(weights[order])]
        self.starts, self.lengths = (np.concatenate(parts) for parts in zip(*cuts, strict=True))
        self.trained_weights = (self.lengths - 1).astype(np.float64)
        if copies is not None:
            self.copies = weights[order][self._row(self.starts)]

    def __getitem__(self, index: int | slice) -> Any:
        """A block as an example; a slice gives the examples of fewer blocks."""
        if isinstance(index, slice):
            return self._part(index)
        ids = torch.from_numpy(self._tokens(int(self.starts[index]), int(self.lengths[index])))
        return Example(prefix_ids=ids[:0], branches=(Branch(ids, torch.ones(len(ids))),))

    def origin(self, index: int) -> str:
        """Where the block begins, "file:line" (of its document, or of the piece of it)."""
        return self.rows.text("origin", self.chosen[self._row(self.starts[index])])

    def _row(self, start: Any) -> Any:
        """Which of the chosen rows holds the token at a place of the joined text."""
        return np.searchsorted(self._stops, start, side="right")

    def _part(self, blocks: slice) -> BlockExamples:
        part = copy(self)
        for name in ("starts", "lengths", "trained_weights"):
            setattr(part, name, getattr(self, name)[blocks])
        part.copies = None if self.copies is None else self.copies[blocks]
        return part

    def _tokens(self, start: int, size: int) -> np.ndarray:
        """Tokens `start : start + size` of the joined text, int64."""
        column, parts = self.rows.ragged("input_ids"), []
        row = int(self._row(start))
        while size > 0:
            ids = column[int(self.chosen[row])]
            at = start - (int(self._stops[row]) - len(ids))
            parts.append(ids[at : at + size])
            start, size, row = start + len(parts[-1]), size - len(parts[-1]), row + 1
        return np.concatenate(parts).astype(np.int64)


def _texts(weights: np.ndarray) -> list[range]:
    """Runs of rows with equal weights: each is a text of its own."""
    bounds = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _cut(text: range, stops: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each block of the text that lies in some rows, int64 each."""
    start = int(stops[text.start - 1]) if text.start else 0
    total = int(stops[text.stop - 1]) - start - 1  # EOS stands between documents, not after the last one
    starts = np.arange(0, max(total, 0), block_size, dtype=np.int64)
    lengths = np.minimum(total - starts, block_size)
    whole = lengths > 1  # a single left-over token, which nothing could predict
    return start + starts[whole], lengths[whole]


@dataclass(frozen=True)
class TextEncoder:
    """Record -> ids of its text, with EOS at the end of each document."""

    tokenizer: PreTrainedTokenizerBase
    overlong: Overlong = "truncate"
    columns = {"input_ids": "int32[]", "key": "int64", "origin": "string"}  # noqa: RUF012 (a constant)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token to put between documents; give one that has")

    @cached_property
    def pieces(self) -> bool:
        """Whether a long text gives the same tokens when it is cut before a line's first letter."""
        probes = (("One.\n", "Two\n"), ("\u4e00\u3002\n", "\u4e8c"), ("x\n", "1"))
        return all(self._ids(a + b) == self._ids(a) + self._ids(b) for a, b in probes)

    def settings(self) -> dict[str, Any]:
        """What the rows depend on."""
        return {}

    def __call__(self, record: Any, place: Place, continues: bool) -> tuple[dict[str, Any], list[str]]:
        """The row of a document, or of a piece of it."""
        text = parse_text(record, place)
        ids = self._ids(text) + ([] if continues else [self.tokenizer.eos_token_id])
        file = place.origin.rpartition(":")[0]
        key = prompt_key(file if file.endswith(".txt") else text)
        return {"input_ids": np.array(ids, dtype=np.int32), "key": key, "origin": place.origin}, []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
