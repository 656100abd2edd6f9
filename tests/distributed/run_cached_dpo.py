"""DPO with a cached reference, twice: the second run finds what the first one wrote; started by the tests.

usage: [torchrun --nproc-per-node N] run_cached_dpo.py MODEL OUT CACHE --devices N
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
import conftest as made

from lit_align.models.source import ModelSource
from lit_align.stages import LitDPO


def run(model: str, cache: str, devices: int) -> dict:
    """What was logged and the weights afterwards; 17 pairs, so that ranks have empty micro-batches."""
    seed_everything(0)
    stage = LitDPO(
        ModelSource(path=model),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4),
        reference_cache=cache if cache != "none" else False,
    )
    logged: list = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    trainer = Trainer(
        **made.QUIET,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=3 if devices > 1 else 1,
        max_epochs=2,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(stage, datamodule=made.ExampleData(made.pairs.__wrapped__()[:17], batch_size=8))
    assert stage.reference is None or cache == "none"
    return {"logged": logged, "weights": stage.state_dict()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("cache")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    results = [run(args.model, args.cache, args.devices) for _ in range(2)]
    torch.save(results, f"{args.out}.{os.environ.get('RANK', 0)}")


if __name__ == "__main__":
    main()
