"""What `predict` leaves behind: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionRows(Callback):
    """Writes the rows that `predict_step` returns (a list of dictionaries) to `predictions.jsonl` in the run folder.

    Rows are written as they come, each rank to a file of its own; the files become one at the end, ordered by the
    rows' `index`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path()
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agrees on one folder with the other ranks."""
        self.folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens this rank's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._part(trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the batch's rows; those of a second data loader say so."""
        assert self._file is not None
        for row in outputs or ():
            row = {"dataloader": dataloader_idx, **row} if dataloader_idx else row
            self._file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes one file of all ranks'."""
        assert self._file is not None
        self._file.close()
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        # Ranks of uneven share repeat rows to stay in step; where a row comes from tells.
        rows = {_origin(line, number): line for number, line in enumerate(lines)}
        path = self.folder / "predictions.jsonl"
        path.write_text("".join(rows[origin] + "\n" for origin in sorted(rows)), encoding="utf-8")
        for part in parts:
            part.unlink()
        print(f"predictions: {path} ({len(rows)} rows)")

    def _part(self, rank: int) -> Path:
        return self.folder / f"predictions.{rank}.jsonl"


def _origin(line: str, number: int) -> tuple[int, int]:
    row = json.loads(line)
    return row.get("dataloader", 0), row.get("index", number)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"predict_step returned a {type(value).__name__}, which JSON cannot hold")
