"""Logged values that are as exact as the loss: weighted over ranks and micro-batches, read once per logged step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class Means(Metric):
    """Weighted means of several values, kept on the device as one table of sums.

    Args:
        names: The values' names; fixed, so that all ranks reduce the same table with one collective.
    """

    full_state_update = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("table", torch.zeros(2, len(self.names), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, **sums: tuple[Tensor | float, Tensor | float]) -> None:
        """Adds (sum of weighted values, sum of weights) for each name given; names left out are unchanged."""
        for name, (total, weight) in sums.items():
            column = self.names.index(name)
            self.table[0, column] += total.detach() if isinstance(total, Tensor) else total
            self.table[1, column] += weight.detach() if isinstance(weight, Tensor) else weight

    def compute(self) -> dict[str, float]:
        """Mean of each value that has weight, over all ranks."""
        sums, weights = self.table.tolist()
        return {n: s / w for n, s, w in zip(self.names, sums, weights, strict=True) if w > 0}
