"""Tokenised rows, memory-mapped from Arrow, of which lengths are known without touching an example."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


class Ragged:
    """A column of lists of numbers, without copies.

    Args:
        column: Arrow lists of int32 or float32.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Numbers in each row, int64."""
        return np.concatenate([np.diff(o) for o in self._offsets] or [np.zeros(0)]).astype(np.int64)

    def __getitem__(self, row: int) -> np.ndarray:
        """The row's numbers: a view that cannot be written to."""
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, at = self._offsets[chunk], row - self._starts[chunk]
        return self._values[chunk][offsets[at] : offsets[at + 1]]


class Rows:
    """A table of tokenised rows; its columns open when they are first used, in each process anew.

    Args:
        table: As written by the tokenisation.

    Attributes:
        weights: How often an epoch sees the rows of each source, by the source's number; None = every row once.
    """

    def __init__(self, table: datasets.Dataset) -> None:
        self.table = table
        self.weights: tuple[float, ...] | None = None
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict:
        return {"table": self.table, "weights": self.weights, "_columns": {}}

    def copies(self, chosen: np.ndarray) -> np.ndarray | None:
        """How often an epoch sees each of the chosen rows, float64 [N]; None = once."""
        return None if self.weights is None else np.array(self.weights)[self.numbers("source")[chosen]]

    def ragged(self, name: str) -> Ragged:
        """A column of lists."""
        if name not in self._columns:
            self._columns[name] = Ragged(self.table.data.column(name))
        return self._columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers."""
        if name not in self._columns:
            self._columns[name] = self.table.data.column(name).to_numpy()
        return self._columns[name]

    def text(self, name: str, row: int) -> str:
        """One row of a column of texts."""
        return self.table.data.column(name)[int(row)].as_py()
