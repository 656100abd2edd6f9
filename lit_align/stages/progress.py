"""What Lightning counts in micro-batches, put right where that count is not the same as before.

Lightning's progress counts the micro-batches of a rank. A run that goes on with other micro-batches, or from inside an
accumulation window whose gradients are gone, has to count from the last optimizer step anew.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def recount(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Changes a Lightning checkpoint's batch counts, in place, to the micro-batches of this run.

    Args:
        checkpoint: As Lightning made it.
        before: Micro-batches per optimizer step when it was written.
        now: Micro-batches per optimizer step in this run.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is None:
        return
    for counts in (progress["current"], progress["total"]):
        steps, begun = divmod(counts["ready"], before)
        # Between a batch's last hook and the end of its accounting, `completed` lags behind by one.
        lag = 0 if begun else counts["ready"] - counts["completed"]
        counts.update({name: steps * now for name in ("ready", "started", "processed")}, completed=steps * now - lag)


def begin_next_epoch(trainer: Trainer) -> None:
    """Lets a run that goes on from the last batch of an epoch begin the next one as every other epoch is begun.

    Lightning counts the old epoch as done, but then takes the new one for the rest of the old: it does not call
    `on_train_epoch_start`, and does not count it as begun, so that a second resume would train an epoch too many.
    """
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch and loop.epoch_progress.current.processed == loop.epoch_progress.current.started:
        loop.reset_restart_stage()


def announce_epoch_end(trainer: Trainer) -> None:
    """Lets the loader know when the trainer takes no more of an epoch: `limit_train_batches` may leave a rest."""
    loader, progress = trainer.train_dataloader, trainer.fit_loop.epoch_loop.batch_progress
    if hasattr(loader, "epoch_over"):
        loader.epoch_over = lambda: 0 < trainer.num_training_batches <= progress.current.ready


def follow_epoch_length(trainer: Trainer) -> None:
    """Tells Lightning how many micro-batches this epoch has: it asks for the first one only.

    Where steps are given in tokens their number may differ from epoch to epoch.
    """
    loop, loader = trainer.fit_loop, trainer.train_dataloader
    if not hasattr(loader, "__len__") or trainer.limit_train_batches != 1.0 or loop.max_batches == len(loader):
        return
    if trainer.val_check_batch == loop.max_batches:
        trainer.val_check_batch = len(loader)
    loop.max_batches = len(loader)
    assert loop._combined_loader is not None
    loop._combined_loader.limits = [len(loader)]
