"""The key-value cache of the decode loop: preallocated rows, each holding one answer that is being written.

A row's tokens end in the column that all rows write next, so one mask and one column serve every architecture, sliding
windows too; a row that is done gives its place to another one, in the cache and in all that belongs to the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Window:
    """What of the cache the next step reads and writes; shared by all layers.

    Attributes:
        rows: Rows that take part.
        start: First column that any of them reads.
        column: Column that they write, and the last one that they read.
        index: The same column on the device, int64 [1]; set = shapes and addresses may not change (CUDA graphs), so
            all columns are read, and the mask alone says what is seen.
    """

    def __init__(self) -> None:
        self.rows = self.start = self.column = 0
        self.index: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, columns, D], never reallocated.

    Args:
        keys: A tensor whose heads, D, dtype and device the keys get.
        values: The same for the values.
        slots: Rows.
        columns: Tokens of a row.
        window: What the next step reads and writes.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slots: int, columns: int, window: Window) -> None:
        super().__init__()
        self.keys = keys.new_zeros(slots, keys.shape[1], columns, keys.shape[3])
        self.values = values.new_zeros(slots, values.shape[1], columns, values.shape[3])
        self.window, self.is_initialized = window, True
        # Else transformers reads the mask back from the device in every step, to see whether it can be left out.
        self.is_compileable = keys.device.type != "cpu"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        """Writes one token of each row, [rows, heads, 1, D], and gives what the rows attend to."""
        w = self.window
        keys, values = self.keys[: w.rows], self.values[: w.rows]
        if w.index is not None:
            return keys.index_copy_(2, w.index, key_states), values.index_copy_(2, w.index, value_states)
        keys[:, :, w.column], values[:, :, w.column] = key_states[:, :, 0], value_states[:, :, 0]
        return keys[:, :, w.start : w.column + 1], values[:, :, w.start : w.column + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that are read, and where they begin."""
        w = self.window
        return (self.keys.shape[2] if w.index is not None else w.column + 1 - w.start), 0

    def get_seq_length(self) -> int | Tensor:
        """Columns before the one that is written."""
        w = self.window
        return w.index if w.index is not None else w.column - w.start

    def get_max_length(self) -> int:
        """All columns."""
        return self.keys.shape[2]


class Prefilled:
    """Prompts that the model has seen once.

    Attributes:
        layers: Keys and values of each layer, [B, heads, P, D], padded on the left.
        sizes: Tokens of each prompt.
        logits: What follows each prompt, float32 [B, V].
        numbers: The prompts' numbers, B.
    """

    def __init__(self, cache: Cache, sizes: list[int], logits: Tensor, numbers: list[int]) -> None:
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.sizes, self.logits, self.numbers = sizes, logits, numbers

    def last(self) -> Prefilled:
        """The last of the prompts alone."""
        one, size = slice(-1, None), self.sizes[-1]
        kept = Prefilled.__new__(Prefilled)
        kept.layers = [(keys[one, :, -size:].clone(), values[one, :, -size:].clone()) for keys, values in self.layers]
        kept.sizes, kept.logits, kept.numbers = [size], self.logits[one].clone(), self.numbers[-1:]
        return kept


class Slots:
    """The rows that are alive, always the first ones, and all that the device knows of them.

    Args:
        prompts: Some that the model has seen: they say how many layers there are, and their shapes.
        slots: Most rows.
        columns: Tokens of a row; the longest prompt and answer have to fit.
        noise_size: Uniform numbers of an answer.
        noise_dtype: Their dtype.

    Attributes:
        cache: What the model gets as `past_key_values`.
        lengths: Tokens of each live row that are in the cache.
        mask: 1 = token of the row's own, int64 [slots, columns].
        token: Drawn last, not yet in the cache, int64 [slots, 1].
        position: Its position, int64 [slots, 1].
        noise: Uniform numbers of the row's answer, [slots, noise_size].
        drawn: How many of them are used up, int64 [slots, 1].
    """

    def __init__(self, prompts: Prefilled, slots: int, columns: int, noise_size: int, noise_dtype: torch.dtype) -> None:
        self.window, self.columns, self.slots = Window(), columns, slots
        self.layers = [SlotLayer(keys, values, slots, columns, self.window) for keys, values in prompts.layers]
        self.cache = Cache(layers=list(self.layers))
        self.lengths: list[int] = []
        whole = {"dtype": torch.long, "device": prompts.logits.device}
        self.mask = torch.zeros(slots, columns, **whole)
        self.token, self.position, self.drawn = (torch.zeros(slots, 1, **whole) for _ in range(3))
        self.noise = torch.zeros(slots, noise_size, dtype=noise_dtype, device=prompts.logits.device)
        self.column = 0
        self.column_index = torch.zeros(1, **whole)

    @property
    def live(self) -> int:
        """Rows that are alive."""
        return len(self.lengths)

    def _per_row(self) -> list[Tensor]:
        return [self.mask, self.token, self.position, self.drawn, self.noise]

    def admit(self, prompts: Prefilled, which: Sequence[int], token: Tensor, noise: Tensor) -> None:
        """Takes rows in.

        Args:
            prompts: Prompts that the model has seen.
            which: Of them, the one that each new row continues, m numbers.
            token: The first token of each row's answer, drawn already, int64 [m].
            noise: Uniform numbers of each row's answer, [m, noise_size].
        """
        sizes = [prompts.sizes[i] for i in which]
        size = max(sizes)
        if not self.live or self.column < size:
            self._shift_to(size)
        rows = slice(self.live, self.live + len(which))
        here = slice(self.column - size, self.column)
        chosen = torch.tensor(which, device=token.device)
        for layer, (keys, values) in zip(self.layers, prompts.layers, strict=True):
            layer.keys[rows, :, here] = keys[chosen, :, -size:]
            layer.values[rows, :, here] = values[chosen, :, -size:]
        lengths = torch.tensor(sizes, device=token.device)[:, None]
        self.mask[rows] = 0
        self.mask[rows, here] = (torch.arange(size, 0, -1, device=token.device) <= lengths).long()
        self.token[rows, 0], self.position[rows], self.drawn[rows], self.noise[rows] = token, lengths, 1, noise
        self.lengths += sizes

    def inputs(self) -> dict[str, Any]:
        """What the model gets for the next step."""
        w = self.window
        if w.index is None:
            self.mask[: w.rows, w.column] = 1
            mask = self.mask[: w.rows, w.start : w.column + 1]
        else:
            mask = self.mask[: w.rows].index_fill_(1, w.index, 1)
        ids, positions = self.token[: w.rows], self.position[: w.rows]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}

    def uniform(self) -> Tensor:
        """The number that decides each row's next token, [rows]."""
        rows = self.window.rows
        return self.noise[:rows].gather(1, self.drawn[:rows])[:, 0]

    def put(self, token: Tensor) -> None:
        """Takes down what was drawn, int64 [rows]; all in place, for a captured graph repeats it."""
        rows = self.window.rows
        self.token[:rows, 0] = token
        # A row that is done before it is looked at goes on in vain, and would run out of numbers and of positions.
        drawn = (self.drawn[:rows] + 1).clamp(max=self.noise.shape[1] - 1)
        self.position[:rows] += drawn - self.drawn[:rows]
        self.drawn[:rows] = drawn
        self.column_index += 1

    def advance(self) -> None:
        """To be called before a step: there is a column to write, and the window is what the live rows need."""
        if self.column == self.columns:
            self._shift_to(max(self.lengths))
        self.window.rows, self.window.column = self.live, self.column
        self.window.start = self.column - max(self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        self.column += 1

    def _shift_to(self, column: int) -> None:
        """Lets the next column be this one."""
        if self.live:
            size, rows = max(self.lengths), slice(0, self.live)
            old, new = slice(self.column - size, self.column), slice(column - size, column)
            for moved in [t for layer in self.layers for t in (layer.keys, layer.values)]:
                moved[rows, :, new] = moved[rows, :, old].clone()
            kept = self.mask[rows, old].clone()
            self.mask[rows] = 0
            self.mask[rows, new] = kept
        self.column = column
        self.column_index.fill_(column)

    def drop(self, done: Sequence[int]) -> list[int]:
        """Takes rows out; the last ones that stay move to their places, so work follows the live rows.

        Returns:
            The old number of each row that is alive now.
        """
        gone, count = set(done), self.live - len(done)
        holes = sorted(row for row in gone if row < count)
        fillers = [row for row in range(count, self.live) if row not in gone]
        order = list(range(count))
        for hole, filler in zip(holes, fillers, strict=True):
            order[hole] = filler
        if holes:
            self._move(fillers, holes, max(self.lengths[row] for row in fillers))
        self.lengths = [self.lengths[row] for row in order]
        return order

    def _move(self, sources: list[int], targets: list[int], size: int) -> None:
        source = torch.tensor(sources, device=self.mask.device)
        target = torch.tensor(targets, device=self.mask.device)
        here = slice(self.column - size, self.column)
        for layer in self.layers:
            for moved in (layer.keys, layer.values):
                moved[:, :, here].index_copy_(0, target, moved[source, :, here])
        for moved in self._per_row():
            moved.index_copy_(0, target, moved[source])
