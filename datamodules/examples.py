"""The examples of a split, and how they are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from datamodules.rows import Rows
from lit_align.batch import Example, MicroBatch, MicroPlan, pack, pad

Layout = Literal["packed", "padded"]


class Examples(Dataset):
    """Examples of a split, made from tokenised rows when they are asked for.

    Args:
        rows: Tokenised rows.
        chosen: The rows that belong to the split, int64 [N].

    Attributes:
        lengths: Unique tokens of each example, int64 [N].
        trained_weights: Sum of the weights of each example's scored tokens, float64 [N].
        copies: How often an epoch of training sees each example, float64 [N]; None = once.
    """

    lengths: np.ndarray
    trained_weights: np.ndarray
    copies: np.ndarray | None

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self.rows, self.chosen = rows, chosen
        self.copies = rows.copies(chosen)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        """The example of an index: what the collator takes."""
        raise NotImplementedError

    def text(self, name: str, index: int) -> str:
        """A text that is kept with the example, by the name of its column."""
        return self.rows.text(name, self.chosen[index])

    def origin(self, index: int) -> str:
        """Where the example comes from, "file:line"."""
        return self.text("origin", index)


@dataclass(frozen=True)
class Collate:
    """Lays out a micro-batch; sent to loader workers."""

    layout: Layout
    padding_side: str
    pad_token_id: int

    def __call__(self, examples: list[Example], plan: MicroPlan) -> MicroBatch:
        """A micro-batch of the plan's examples."""
        if self.layout == "packed":
            return pack(examples, plan.indices, plan.totals)
        return pad(examples, plan.indices, plan.totals, self.pad_token_id, self.padding_side)
