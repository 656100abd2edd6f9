"""PPO that asks a reward server, each rank with its number in a header; started by the tests.

usage: [torchrun --nproc-per-node N] run_remote_rewards.py MODEL OUT URL --devices N
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
from lit_align.rollout.remote import RemoteReward
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitPPO, PPOSettings


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("url")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    rank = os.environ.get("RANK", "0")
    seed_everything(0)
    stage = LitPPO(
        ModelSource(path=args.model),
        reward_functions=[RewardFunction(RemoteReward(args.url, batch_size=3, headers={"X-Rank": rank}))],
        estimator=RLOO(),
        ppo=PPOSettings(num_answers=2),
        sampling=Sampling(max_new_tokens=4),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    strategy = "ddp" if args.devices > 1 else "auto"
    trainer = Trainer(**made.QUIET, devices=args.devices, strategy=strategy, max_epochs=1, limit_val_batches=0)
    trainer.fit(stage, datamodule=made.ExampleData(made.prompts.__wrapped__()[:7], batch_size=7))
    torch.save(stage.state_dict(), f"{args.out}.{rank}")


if __name__ == "__main__":
    main()
