"""Several hosts: whether their processes are at one run, before anything is trained."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

SECONDS = 5.0
"""How long another host's new file may take to appear on a shared disk."""


class OneRun(Callback):
    """Refuses to begin where ranks would go on from different checkpoints, read different data or lose shards.

    Args:
        run_dir: Folder of the run; that of rank 0 counts.
        checkpoint: What this rank goes on from; None = it begins.
    """

    def __init__(self, run_dir: str | Path, checkpoint: str | None = None) -> None:
        super().__init__()
        self.run_dir, self.checkpoint = Path(run_dir), checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares the ranks; the data are set up by now.

        Raises:
            ValueError: On every rank, where one of them differs.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        ranks = _of_all_ranks((platform.node(), _described(self.checkpoint), _identity(trainer)))
        _same_checkpoint([(host, found) for host, found, _ in ranks])
        _same_data([(host, identity) for host, _, identity in ranks])
        self._same_folder(trainer)

    def _same_folder(self, trainer: Trainer) -> None:
        mark = self._mark(trainer)
        blind = [
            f"rank {n} on {host}"
            for n, (host, sees) in enumerate(_of_all_ranks((platform.node(), _appears(mark))))
            if not sees
        ]
        if trainer.is_global_zero:
            mark.unlink()
        if not blind:
            return
        folder = f"{mark.parent} (of rank 0) is not there for {', '.join(blind)}"
        if getattr(trainer.strategy, "shards", False):
            raise ValueError(
                f"run_dir: {folder}, and every rank writes its shards of a checkpoint there; give a folder on a disk "
                "that all hosts share, as an absolute path"
            )
        rank_zero_warn(
            f"run_dir: {folder}: checkpoints and results lie with rank 0 alone. To go on after a kill, copy the folder "
            "to every host first, or give one on a disk that all hosts share"
        )

    def _mark(self, trainer: Trainer) -> Path:
        """A new file of rank 0 in its run folder; the others wait for it."""
        mark, fault = self.run_dir / f".seen-{uuid.uuid4().hex}", None
        if trainer.is_global_zero:
            try:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            except OSError as error:  # raised by itself, it would leave the other ranks waiting
                fault = str(error)
        mark, fault = trainer.strategy.broadcast((mark, fault))
        if fault is not None:
            raise ValueError(f"run_dir: rank 0 cannot write into {mark.parent}: {fault}")
        return mark


@contextmanager
def failing_together(trainer: Trainer) -> Iterator[None]:
    """What goes wrong inside on rank 0 is raised on every rank: raised there alone, it would leave the others waiting.

    All ranks wait at its end for rank 0.

    Raises:
        ValueError: On the other ranks, with rank 0's message.
    """
    fault = None
    try:
        yield
    except Exception as error:
        fault = error
    told = trainer.strategy.broadcast(None if fault is None else f"{type(fault).__name__}: {fault}")
    if fault is not None:
        raise fault
    if told is not None:
        raise ValueError(f"rank 0 has failed: {told}")


def _same_checkpoint(ranks: list[tuple[str, str]]) -> None:
    other = next((n for n, (_, found) in enumerate(ranks) if found != ranks[0][1]), None)
    if other is not None:
        raise ValueError(
            f"ckpt_path: rank 0 on {ranks[0][0]} {ranks[0][1]}, rank {other} on {ranks[other][0]} {ranks[other][1]}; "
            "give all hosts the same run folder, on a shared disk or as a copy"
        )


def _same_data(ranks: list[tuple[str, dict[str, str]]]) -> None:
    first = ranks[0][1]
    for number, (host, identity) in enumerate(ranks):
        names = [name for name in {**first, **identity} if first.get(name) != identity.get(name)]
        if names:
            raise ValueError(
                f"data: rank {number} on {host} and rank 0 on {ranks[0][0]} differ in {', '.join(names)}; all hosts "
                "have to read the same files with the same settings"
            )


def _described(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "begins"
    path = Path(checkpoint)
    return f"goes on from {path.name}" + (f" ({path.stat().st_size} bytes)" if path.is_file() else "")


def _identity(trainer: Trainer) -> dict[str, str]:
    identity = getattr(getattr(trainer, "datamodule", None), "identity", None)
    return identity() if callable(identity) else {}


def _appears(path: Path) -> bool:
    until = time.monotonic() + SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    return seen


def _of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
