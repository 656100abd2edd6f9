"""Saves and resumes sharded runs; started by the test under torchrun.

usage: torchrun --nproc-per-node 2 sharded_checkpoints.py MODEL FOLDER

Each rank leaves FOLDER/result.<rank>: for each name what was logged, and the weights at the end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run_stages import build, items, made, whole

from lit_align.callbacks import Checkpoints, ExportHF, RandomState
from lit_align.checkpoint_io import WholeCheckpointIO

HALFWAY = {"dpo": 4, "ppo": 6, "rm lora": 4}
"""Steps inside an epoch, after which runs go on for one more step; that of PPO is inside a rollout."""


def halfway(name: str, folder: Path) -> Path:
    """The checkpoint before the last."""
    return folder / "checkpoints" / f"step{HALFWAY[name]:06d}.ckpt"


def fit(name: str, model: str, folder: Path, strategy: str, devices: int, resume: Path | None = None) -> dict[str, Any]:
    """Trains; a checkpoint after every other step, an export at the end."""
    stage = build(name, model)
    logged: list = []
    stage.log = lambda name, value, **_: logged.append((stage.trainer.global_step, name, float(value)))
    trainer = Trainer(
        **{**made.QUIET, "enable_checkpointing": True},
        default_root_dir=str(folder),
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=2,
        max_steps=HALFWAY[name] + 1,
        max_epochs=-1,
        log_every_n_steps=1,
        limit_val_batches=0,
        gradient_clip_val=0.1,
        callbacks=[RandomState(), Checkpoints(str(folder / "checkpoints"), 2), ExportHF()],
        plugins=[WholeCheckpointIO()],
    )
    trainer.fit(stage, datamodule=made.ExampleData(items(name), batch_size=8), ckpt_path=resume)
    return {"logged": logged, "weights": whole(stage.state_dict()), "fingerprints": stage.fingerprints()}


def main(model: str, folder: str) -> None:
    """See the module."""
    root, results = Path(folder), {}
    for name in HALFWAY:
        here = root / name
        results[name] = fit(name, model, here / "whole", "fsdp2", 2)
        results[f"{name}, resumed"] = fit(
            name, model, here / "resumed", "fsdp2", 2, resume=halfway(name, here / "whole")
        )
        results[f"{name}, from one"] = fit(
            name, model, here / "from one", "fsdp2", 2, resume=halfway(name, root / "of one" / name)
        )
    torch.save(results, root / f"result.{os.environ['RANK']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
