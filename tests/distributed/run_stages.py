"""Trains every stage on hand-made examples for a few steps and writes what came out; started by the tests.

usage: [torchrun --nproc-per-node N] run_stages.py MODEL OUT --devices N --accumulate K --strategy ddp|fsdp2
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
import conftest as made
from trunk import write_reward_adapter

from lit_align import strategies  # noqa: F401 (registers fsdp2)
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings
from lit_align.stages.stage import Stage

STAGES = {"pt": LitPretrain, "sft": LitSFT, "rm": LitReward, "dpo": LitDPO, "ppo": LitPPO}
LORA = LoraSettings(r=4, alpha=8)
SCRATCH = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "pt from scratch": {"config": SCRATCH},
    "dpo from scratch": {"config": SCRATCH},
    "sft checkpointing": {"gradient_checkpointing": True},
    "rm lora": {"lora": LORA},
    "dpo lora": {"lora": LORA},
    "ppo lora": {"lora": LORA, "gradient_checkpointing": True},
    "ppo trunk": {"lora": LORA, "gradient_checkpointing": True},
}
"""Settings of the networks."""
NAMES = [*STAGES, *VARIANTS]


def short(prompts: list[str], answers: list[str], records: list[dict]) -> list[float]:
    """Reward: short answers."""
    return [-len(answer) / 10 for answer in answers]


def items(stage: str) -> list:
    """Ragged examples for the stage; 17 of them, so that the last step holds one and leaves micro-batches empty."""
    stage = stage.split()[0]
    made_by = {"rm": made.pairs, "dpo": made.pairs, "ppo": made.prompts}.get(stage, made.conversations)
    return made_by.__wrapped__()[: 16 if stage == "ppo" else 17]


def source(name: str, model: str) -> ModelSource:
    """Where the networks come from."""
    settings = VARIANTS.get(name, {})
    return ModelSource(**({"tokenizer": model} if "config" in settings else {"path": model}), **settings)


def build(name: str, model: str) -> Stage:
    """The stage; PPO with all four networks."""
    seed_everything(0, verbose=False)
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4)}
    if name.startswith("ppo"):
        options |= {
            "reward_model": ModelSource(path=model),
            "reward_functions": [RewardFunction(short)],
            "ppo": PPOSettings(ppo_epochs=2, num_minibatches=2, num_answers=2, scoring_max_tokens=40),
            "sampling": Sampling(max_new_tokens=5, batch_size=4),
        }
    if name == "ppo trunk":
        options |= {"reward_model": write_reward_adapter(model, tempfile.mkdtemp()), "shared_trunk": True}
        seed_everything(0, verbose=False)
    return STAGES[name.split()[0]](source(name, model), **options)


def run(name: str, model: str, devices: int, accumulate: int, strategy: str) -> dict:
    """What the stage logged, and its weights afterwards."""
    stage = build(name, model)
    logged: list = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    trainer = Trainer(
        **made.QUIET,
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
        log_every_n_steps=1,
        limit_val_batches=0,
        gradient_clip_val=0.1,
    )
    trainer.fit(stage, datamodule=made.ExampleData(items(name), batch_size=8))
    return {"logged": logged, "weights": whole(stage.state_dict()), "apart": apart(stage)}


def apart(stage: Stage) -> list[str]:
    """Frozen weights of the critic's that do not lie in the policy's memory; of a shard, this rank's part."""

    def places(network: torch.nn.Module) -> dict[str, int]:
        frozen = ((name, p) for name, p in network.named_parameters() if not p.requires_grad)
        local = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in frozen)
        return {name: value.untyped_storage().data_ptr() for name, value in local}

    if getattr(stage, "critic", None) is None:
        return []
    own = set(places(stage.policy).values())
    return [name for name, place in places(stage.critic).items() if place not in own]


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights without shards."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--only", nargs="*", default=NAMES)
    args = parser.parse_args()
    results = {name: run(name, args.model, args.devices, args.accumulate, args.strategy) for name in args.only}
    torch.save(results, f"{args.out}.{os.environ.get('RANK', 0)}")


if __name__ == "__main__":
    main()
