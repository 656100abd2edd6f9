"""When checkpoints are written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

KEPT = 2
OWN = re.compile(r"(preempted-)?step\d{6,}\.ckpt")
"""Names of checkpoints that this callback and `Preemption` write."""


class Checkpoints(ModelCheckpoint):
    """The newest two checkpoints of a run: one at the end of every epoch, and one every so many optimizer steps.

    Two, so that there is a whole one while the next is written. Where validation is due after the same step it comes
    first, so that a resumed run neither misses nor repeats it.

    Args:
        folder: Where they are written.
        every_n_steps: Optimizer steps between checkpoints inside an epoch; None = only at the end of epochs.
    """

    def __init__(self, folder: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint_every: expected at least 1 optimizer step, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        super().__init__(
            folder,
            "step{step:06d}",
            "step",
            mode="max",
            save_top_k=KEPT,
            save_last="link",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
            enable_version_counter=False,  # else a resumed run's newest would be last-v1.ckpt
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step that a run goes on from is written already."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes one after a step whose turn it is, and after the last step of a run that ends inside an epoch."""
        inside = trainer.fit_loop.epoch_loop._should_accumulate()
        if self._due(trainer) and not inside and not validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the one that waited for this validation; the last of an epoch is written at the epoch's end."""
        if self._due(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes one."""
        self._save(trainer)

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return step == trainer.max_steps or (self.every_n_steps is not None and step % self.every_n_steps == 0)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # written already, or a sanity check
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._remove_others(trainer)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Points `last.ckpt` at a checkpoint, at once or, where it is written in the background, when it is there."""
        afterwards = getattr(trainer.strategy.checkpoint_io, "afterwards", None)
        if afterwards is None:
            ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
        elif trainer.is_global_zero:
            afterwards(_link, Path(filepath), Path(linkpath))

    def _remove_others(self, trainer: Trainer) -> None:
        """Removes what earlier parts of the run left: Lightning knows of its own process's files alone."""
        if self.save_top_k != KEPT or self.dirpath is None or not trainer.is_global_zero:
            return
        written = [path for path in Path(self.dirpath).glob("*step*.ckpt") if OWN.fullmatch(path.name)]
        for path in sorted(written, key=_written_at)[:-KEPT]:
            trainer.strategy.remove_checkpoint(path)


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # the thread that writes checkpoints has just removed it
        return 0


def _link(path: Path, link: Path) -> None:
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(path, link.parent))
    if link.is_dir() and not link.is_symlink():  # where links are not allowed, folders were copied
        shutil.rmtree(link)
    fresh.replace(link)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning will validate once the hooks of this batch have run."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
