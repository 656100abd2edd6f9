"""Trains on two ranks and counts what they ask each other; started by the test under torchrun.

usage: count_collectives.py MODEL OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
import conftest as made

from lit_align.callbacks import Meter, Preemption
from lit_align.models.source import ModelSource
from lit_align.stages import LitSFT

CALLS = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier", "reduce")


class Counter(Callback):
    """Counts calls of collectives while training batches are worked on."""

    def __init__(self) -> None:
        super().__init__()
        self.batches, self.calls = 0, dict.fromkeys(CALLS, 0)

    def on_train_start(self, *_: Any) -> None:
        """Puts a counter before every collective."""
        for name in CALLS:
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))

    def _counted(self, name: str, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return call(*args, **kwargs)

        return counted

    def on_train_batch_end(self, *_: Any) -> None:
        """Counts the batch."""
        self.batches += 1


def main(model: str, out: str) -> None:
    """See the module."""
    counter, meter = Counter(), Meter(flops_per_second=1e9, bytes_per_second=1e9)
    trainer = Trainer(
        **made.QUIET,
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=4,
        max_epochs=1,
        log_every_n_steps=1000,
        limit_val_batches=0,
        callbacks=[Preemption(), meter, counter],
    )
    stage = LitSFT(ModelSource(path=model))
    trainer.fit(stage, datamodule=made.ExampleData(made.conversations.__wrapped__(), batch_size=8))
    found = {"steps": trainer.global_step, "batches": counter.batches, **counter.calls}
    found["tokens"] = meter._last["tokens"] - meter._start["tokens"]
    found["useful"] = meter.results["perf/tokens_per_second"] * (meter._last["seconds"] - meter._start["seconds"])
    torch.save(found, f"{out}.{os.environ['RANK']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
