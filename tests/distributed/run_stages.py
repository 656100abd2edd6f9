"""Trains every stage on hand-made examples for a few steps and writes what came out; started by the tests.

usage: [torchrun --nproc-per-node N] run_stages.py MODEL OUT --devices N --accumulate K
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
from lit_align.rollout.estimators import RLOO
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings

STAGES = {"pt": LitPretrain, "sft": LitSFT, "rm": LitReward, "dpo": LitDPO, "ppo": LitPPO}


def short(prompts: list[str], answers: list[str], records: list[dict]) -> list[float]:
    """Reward: short answers."""
    return [-len(answer) / 10 for answer in answers]


def items(stage: str) -> list:
    """Ragged examples for the stage; 17 of them, so that the last step holds one and leaves micro-batches empty."""
    made_by = {"rm": made.pairs, "dpo": made.pairs, "ppo": made.prompts}.get(stage, made.conversations)
    return made_by.__wrapped__()[: 16 if stage == "ppo" else 17]


def run(name: str, model: str, devices: int, accumulate: int) -> dict:
    """What the stage logged, and its weights afterwards."""
    seed_everything(0)
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4)}
    if name == "ppo":
        # Greedy in effect: the ranks' random numbers differ, their samples must not.
        options |= {
            "reward_functions": [RewardFunction(short)],
            "ppo": PPOSettings(ppo_epochs=2, num_minibatches=2, num_answers=2),
            "sampling": Sampling(max_new_tokens=5, temperature=1e-6),
            "estimator": RLOO(),
        }
    stage = STAGES[name](ModelSource(path=model), **options)
    logged: list = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    trainer = Trainer(
        **made.QUIET,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_epochs=3,
        log_every_n_steps=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    trainer.fit(stage, datamodule=made.ExampleData(items(name), batch_size=8))
    return {"logged": logged, "weights": stage.state_dict()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()
    results = {name: run(name, args.model, args.devices, args.accumulate) for name in STAGES}
    torch.save(results, f"{args.out}.{os.environ.get('RANK', 0)}")


if __name__ == "__main__":
    main()
