"""SIGTERM, and SIGUSR1 of SLURM: what a cluster sends before it takes the machine away; and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed

from lit_align.callbacks.checkpoints import validation_is_due


class Preemption(Callback):
    """After a SIGTERM to any rank, writes a checkpoint at the next optimizer step and ends the run.

    Under SLURM after a SIGUSR1 too (`--signal=USR1@120`). Putting the job into the queue again is left to its script.
    After a Ctrl-C too; a second one ends the run at once, without a checkpoint.

    Lightning then raises its `SIGTERMException`; the command line ends with exit code 143.

    Args:
        folder: Where the checkpoint, `preempted-step000012.ckpt`, is written; None = nothing is written.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._told = self._waits = False
        self._signal = signal.SIGTERM.name
        self._step = 0
        self._group: Any = None
        self._before: Any = None
        self._speaks = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the place of Lightning's own answer to the signal, before Lightning registers it."""
        self._told = False
        # Lightning's answer broadcasts from inside the signal, whatever the ranks are at: they may wait for ever.
        trainer._signal_connector._sigterm_notifier_fn = self._tell  # type: ignore[method-assign]
        # The same to SLURM's: it saves inside the signal, in the middle of a step, where ranks are at different places.
        trainer._signal_connector._slurm_sigusr_handler_fn = self._tell  # type: ignore[method-assign]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives Ctrl-C back."""
        self._answer_as_before()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        self._answer_as_before()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the ranks' agreement, and answers Ctrl-C from here on."""
        self._step = trainer.global_step
        self._speaks = trainer.is_global_zero
        # Not earlier: Lightning has noted all answers by now, and puts those back at the end. A run in the background
        # (which ignores Ctrl-C) and a notebook keep their own.
        alone = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        if trainer.world_size > 1:
            # The ranks agree on the CPU: asking a GPU would wait for all that it still has to do.
            self._group = distributed.new_group(backend="gloo")
            # Lightning would ask all ranks before every micro-batch, and read the answer from the device.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the checkpoint if a step has just been made and some rank was told to stop."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self._any_rank_told():
            return
        self._save(trainer)
        if validation_is_due(trainer):
            self._waits = True
        else:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops after a validation that was due: a resumed run does not make it again. Saves once more."""
        if self._waits:
            self._save(trainer)
            self._stop(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.folder is None:
            rank_zero_info(
                f"{self._signal}: the run stops after step {self._step}; checkpoints are off, nothing was saved"
            )
            return
        path = Path(self.folder) / f"preempted-step{self._step:06d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # the optimizer's state too
        getattr(trainer.strategy.checkpoint_io, "wait", _nothing)()  # where it is written in the background
        rank_zero_info(f"{self._signal}: the run stops after step {self._step}; --resume true goes on from {path}")

    def _stop(self, trainer: Trainer) -> None:
        # Lightning ends the run once this batch is accounted for and its metrics are logged.
        self._waits = False
        trainer._signal_connector.received_sigterm = True

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        self._signal = signal.Signals(number).name

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._tell(number, frame)
        self._answer_as_before()
        after = "with a checkpoint" if self.folder is not None else "without a checkpoint: they are off"
        if self._speaks:
            print(f"Ctrl-C: the run stops after this step, {after}; once more: at once", file=sys.stderr, flush=True)

    def _answer_as_before(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _any_rank_told(self) -> bool:
        if self._group is None:
            return self._told
        told = torch.tensor([float(self._told)])
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group)
        return bool(told.item())


def _nothing() -> None:
    pass
