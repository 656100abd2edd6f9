"""What data modules say of themselves before a run: a check of all records, what the model will see, how long it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.lengths import sequence_lengths

if TYPE_CHECKING:
    from datamodules.check_report import CheckReport
    from datamodules.costing import TrainCost
    from datamodules.views import Preview


class Inspection:
    """What the stages, and `lit-align data check`, `data preview` and `plan` ask an `AlignDataModule`."""

    def longest(self) -> int:
        """Tokens of the longest sequence of the data that was set up; of a stream, as many as it may have."""
        module: Any = self
        sizes = [sequence_lengths(e.rows, e.chosen, e.lengths).max(initial=0) for e in module.datasets.values()]
        return max(module.max_length if module.streaming else 0, *map(int, sizes), 0)

    def check(self, limit: int = 20, *, world_size: int = 1, micro_batches: int = 1) -> CheckReport:
        """Reads and tokenises every configured split to its end and says what is wrong with it and what it costs.

        Nothing is kept, and neither `on_error` nor `overlong` stops it.

        Args:
            limit: Faults to tell in full; all are counted.
            world_size: Ranks that would share each step.
            micro_batches: Micro-batches that each rank would accumulate (`accumulate_grad_batches`).

        Returns:
            A report whose `str` is for people, and whose `ok` is False if a run would stop at a fault or skip it.

        Raises:
            ValueError: The configuration is wrong, or a source is not there.
        """
        from datamodules.checking import check

        module: Any = self
        return check(module, limit=limit, world_size=world_size, micro_batches=micro_batches)

    def preview(self, n: int = 3, split: str = "train", *, world_size: int = 1, micro_batches: int = 1) -> Preview:
        """What the model will see: the first examples of the first epoch, in the micro-batches that hold them.

        Args:
            n: How many examples.
            split: Of which split.
            world_size: Ranks that would share each step.
            micro_batches: Micro-batches that each rank would accumulate (`accumulate_grad_batches`).

        Returns:
            A preview that has `text(color)` for terminals and `html()` for browsers.

        Raises:
            ValueError: There is no such data, or it is faulty in a way that would stop a run.
        """
        from datamodules.preview import preview

        module: Any = self
        return preview(module, n, split, world_size=world_size, micro_batches=micro_batches)

    def train_cost(self, *, world_size: int = 1, micro_batches: int = 1) -> TrainCost | None:
        """What the first epoch of training holds; None where that would take long to find out.

        Args:
            world_size: Ranks that would share each step.
            micro_batches: Micro-batches that each rank would accumulate (`accumulate_grad_batches`).
        """
        from datamodules.costing import train_cost

        module: Any = self
        return train_cost(module, world_size=world_size, micro_batches=micro_batches)
