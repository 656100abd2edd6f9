"""Trains on two ranks of which one gets a SIGTERM in the sanity check; started by the test under torchrun.

usage: stop_early.py MODEL FOLDER RANK STRATEGY
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
import conftest as made

from lit_align import strategies  # noqa: F401 (registers fsdp2)
from lit_align.callbacks import Preemption
from lit_align.models.source import ModelSource
from lit_align.stages import LitSFT


class Terminated(Callback):
    """Sends one rank a SIGTERM before the first step."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sends it."""
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def main(model: str, folder: str, rank: str, strategy: str) -> None:
    """Leaves a file named after the step at which this rank stopped."""
    trainer = Trainer(
        **made.QUIET,
        devices=2,
        strategy=strategy,
        max_epochs=1,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        callbacks=[Preemption(folder), Terminated(int(rank))],
    )
    try:
        data = made.ExampleData(made.conversations.__wrapped__(), batch_size=8)
        trainer.fit(LitSFT(ModelSource(path=model)), datamodule=data)
    except SIGTERMException:
        (Path(folder) / f"rank{trainer.global_rank}-stopped-at-{trainer.global_step}").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
