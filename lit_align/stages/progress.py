"""What Lightning counts in micro-batches, put right where that count is not, or not any more, that of this run.

Lightning's progress counts the micro-batches of a rank. A run that goes on with other micro-batches, or from inside an
accumulation window whose gradients are gone, has to count from the last optimizer step anew. And what Lightning does
after a resume depends on the hook in which the checkpoint was written; not all of these paths count right.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def recount(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Brings a Lightning checkpoint's counts, in place, to one form: written right after the last whole step.

    Args:
        checkpoint: As Lightning made it.
        before: Micro-batches per optimizer step when it was written.
        now: Micro-batches per optimizer step in this run.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    if "epoch_loop.batch_progress" not in loop:
        return
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    ready, seen = batches["current"]["ready"], batches["current"]["processed"]  # an exception may lie in between
    steps, earlier = seen // before, (batches["total"]["ready"] - ready) // before
    for counts, done in ((batches["current"], steps), (batches["total"], earlier + steps)):
        counts.update({name: done * now for name in ("ready", "started", "processed", "completed")})
        if steps:  # as it is while the hooks of the last batch run
            counts["completed"] -= 1
    batches["is_last_batch"] &= seen == ready and seen % before == 0
    if steps:
        # The number of the step that is logged next; Lightning adds one when it goes on.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1
        # Lightning counts an epoch as done when it stops inside it (`max_steps`): it is not.
        for counts in (epochs["current"], epochs["total"]):
            counts["processed"] = counts["completed"] = counts["started"] - 1


def begin_next_epoch(trainer: Trainer) -> None:
    """Lets a run that goes on from the last batch of an epoch begin the next one as every other epoch is begun.

    Lightning counts the old epoch as done, but then takes the new one for the rest of the old: it does not call
    `on_train_epoch_start`, and does not count it as begun, so that a second resume would train an epoch too many. And
    it compares the batches of the old epoch with the length of the new one, which may be another.
    """
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch and loop.epoch_progress.current.processed == loop.epoch_progress.current.started:
        loop.reset_restart_stage()
        loop.epoch_loop.batch_progress.increment_completed()
        loop.epoch_loop.reset_restart_stage()
        loop.epoch_loop.restarting = False
        loop.epoch_loop._batches_that_stepped = trainer.global_step


def tell_loader(trainer: Trainer) -> None:
    """Lets the loader know how far the trainer is.

    That is, when it takes no more of an epoch (`limit_train_batches` may leave a rest), and whether it has been through
    the micro-batch that it was given last.
    """
    loader, progress = trainer.train_dataloader, trainer.fit_loop.epoch_loop.batch_progress
    if hasattr(loader, "epoch_over"):
        loader.epoch_over = lambda: 0 < trainer.num_training_batches <= progress.current.processed
    if hasattr(loader, "unfinished"):
        loader.unfinished = lambda: progress.current.processed < progress.current.ready


def check_whole_steps(trainer: Trainer) -> None:
    """Refuses a limit that ends an epoch inside a step: its loss would be divided by examples that are not seen.

    Raises:
        ValueError: Says what to change.
    """
    batches, parts = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches != float("inf") and batches % parts:
        raise ValueError(
            f"limit_train_batches leaves {batches} micro-batches an epoch, and each optimizer step takes {parts} "
            f"(accumulate_grad_batches): expected a multiple, such as {batches // parts * parts or parts}"
        )


def check_validation_interval(trainer: Trainer) -> None:
    """Refuses validation by the clock on several devices: each looks at its own, and ranks would wait for ever.

    Raises:
        ValueError: Says what to change.
    """
    if trainer.world_size > 1 and getattr(trainer, "_val_check_time_interval", None) is not None:
        raise ValueError(
            "trainer.val_check_interval: a time is taken by each rank's own clock, and one would validate while others "
            f"train; with {trainer.world_size} devices give micro-batches or a share of an epoch"
        )


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
    assert loop._combined_loader is not None and loop._data_fetcher is not None
    loop._combined_loader.limits = [len(loader)]
    loop._data_fetcher.length = len(loader)


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, the same number after a resume, for schedules."""
    estimated = int(trainer.estimated_stepping_batches)  # sets the loader up
    loader, epochs = trainer.train_dataloader, trainer.max_epochs
    if (
        getattr(loader, "max_tokens", None) is None
        or epochs is None
        or epochs < 0
        or trainer.limit_train_batches != 1.0
    ):
        return max(estimated, 1)
    steps = sum(len(loader.plan(epoch)) for epoch in range(epochs))
    return max(steps if trainer.max_steps < 0 else min(steps, trainer.max_steps), 1)
