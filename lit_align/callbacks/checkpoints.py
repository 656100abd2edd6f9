"""When checkpoints are written."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """The newest two checkpoints of a run: one at the end of every epoch, and one every so many optimizer steps.

    Two, so that there is a whole one while the next is written.

    Args:
        folder: Where they are written.
        every_n_steps: Optimizer steps between checkpoints inside an epoch; None = only at the end of epochs.
    """

    def __init__(self, folder: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint_every: expected at least 1 optimizer step, got {every_n_steps}")
        steps: dict[str, Any] = {} if every_n_steps is None else {"every_n_train_steps": every_n_steps}
        super().__init__(
            folder,
            "step{step:06d}",
            "step",
            mode="max",
            save_top_k=2,
            save_last="link",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
            **steps,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes one, unless the epoch's last step has just been written."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
