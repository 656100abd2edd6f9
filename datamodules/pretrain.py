"""Long text cut in blocks: the data of pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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
    `validation` is split off by document; of a single document, its last blocks are held out.

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
        blocks: The blocks to keep; None = all.
    """

    def __init__(self, rows: Rows, chosen: np.ndarray, block_size: int, blocks: range | None = None) -> None:
        super().__init__(rows, chosen)
        self.block_size = block_size
        self._stops = np.cumsum(rows.ragged("input_ids").lengths[chosen])
        total = int(self._stops[-1]) - 1  # EOS stands between documents, not after the last one
        lengths = np.full(-(-total // block_size), block_size, dtype=np.int64)
        lengths[-1:] = total - block_size * (len(lengths) - 1)
        if len(lengths) and lengths[-1] == 1:
            lengths = lengths[:-1]
        self.blocks = range(len(lengths)) if blocks is None else blocks
        self.lengths = lengths[self.blocks.start : self.blocks.stop]
        self.trained_weights = (self.lengths - 1).astype(np.float64)

    def __getitem__(self, index: int | slice) -> Any:
        """A block as an example; a slice gives the examples of fewer blocks."""
        if isinstance(index, slice):
            return BlockExamples(self.rows, self.chosen, self.block_size, self.blocks[index])
        ids = torch.from_numpy(self._tokens(self.blocks[index] * self.block_size, int(self.lengths[index])))
        return Example(prefix_ids=ids[:0], branches=(Branch(ids, torch.ones(len(ids))),))

    def origin(self, index: int) -> str:
        """Where the block begins, "file:line" (of its document, or of the piece of it)."""
        row = np.searchsorted(self._stops, self.blocks[index] * self.block_size, side="right")
        return self.rows.text("origin", self.chosen[row])

    def _tokens(self, start: int, size: int) -> np.ndarray:
        """Tokens `start : start + size` of the joined text, int64."""
        column, parts = self.rows.ragged("input_ids"), []
        row = int(np.searchsorted(self._stops, start, side="right"))
        while size > 0:
            ids = column[int(self.chosen[row])]
            at = start - (int(self._stops[row]) - len(ids))
            parts.append(ids[at : at + size])
            start, size, row = start + len(parts[-1]), size - len(parts[-1]), row + 1
        return np.concatenate(parts).astype(np.int64)


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
