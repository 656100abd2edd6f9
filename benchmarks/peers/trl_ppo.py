"""The peer's side of PPO: TRL 1.12.0, the last release with a PPO trainer. One process measures one way to run it.

Usage (in its own environment): python -m benchmarks.peers.trl_ppo VARIANT SCRATCH OUT.json [--forced]

With --forced both sides are given the same answers instead of sampling them, so that losses and gradients can be
compared; what is timed is the trainer as it is.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.meter import Meter, digest
from benchmarks.settings import Settings
from benchmarks.tokens import forced_answers, iterations, load_tokens


class Stamp(TrainerCallback):
    """Stamps the end of every iteration."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An iteration has ended."""
        self.meter.stamp()


def arguments(variant: str, settings: Settings, count: int, out: Path) -> dict[str, Any]:
    """The shared settings, then what the variant is."""
    given: dict[str, Any] = {
        "output_dir": str(out.parent / "trl"),
        "per_device_train_batch_size": settings.batch_size,
        "total_episodes": count * settings.batch_size,
        "num_ppo_epochs": settings.ppo_epochs,
        "response_length": settings.response_length,
        "temperature": 1.0,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_epsilon": settings.eps,
        "weight_decay": settings.weight_decay,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "seed": settings.seed,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "num_sample_generations": 0,
        "use_cpu": settings.device == "cpu",
    }
    if variant != "shipped":
        given["gradient_checkpointing"] = False
    return given


def force_answers(vocabulary: int) -> None:
    """Puts given answers, and their logits, in the place of sampled ones."""

    def given(model: Any, queries: Any, batch_size: int, pad_token_id: int, config: Any) -> tuple[Any, Any]:
        rows = [row[row != pad_token_id].tolist() for row in queries]
        answers = torch.tensor(forced_answers(rows, config.max_new_tokens, vocabulary))
        whole = torch.cat([queries, answers.to(queries)], dim=1)
        with torch.no_grad():
            logits = ppo_trainer.forward(model, whole, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / config.temperature

    ppo_trainer.batch_generation = given


def trainer_of(variant: str, settings: Settings, scratch: Path, out: Path, count: int) -> PPOTrainer:
    """The trainer with its four networks, which takes the prompts in their order."""
    tokenizer = AutoTokenizer.from_pretrained(scratch / "scalar", padding_side="left")
    dtype = getattr(torch, settings.dtype)
    policy, reference = (AutoModelForCausalLM.from_pretrained(scratch / "policy", dtype=dtype) for _ in range(2))
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(scratch / "scalar", num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    prompts = Dataset.from_list([{"input_ids": row["prompt"]} for row in load_tokens(scratch)])
    trainer = PPOTrainer(
        PPOConfig(**arguments(variant, settings, count, out)),
        tokenizer,
        policy,
        reference,
        reward,
        prompts,
        critic,
        eval_dataset=prompts,
    )
    in_order = DataLoader(
        prompts, settings.batch_size, collate_fn=DataCollatorWithPadding(tokenizer), drop_last=True, shuffle=False
    )
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


def measure(variant: str, scratch: Path, out: Path, forced: bool) -> None:
    """Runs the iterations and writes what they cost."""
    settings = Settings.load(scratch / "settings.json")
    torch.set_num_threads(settings.threads)
    count, meter = 1 if forced else settings.warmup + settings.steps, Meter(settings.device)
    trainer = trainer_of(variant, settings, scratch, out, count)
    if forced:
        force_answers(trainer.policy_model.config.vocab_size)
    backward = trainer.accelerator.backward

    def watched(loss: torch.Tensor) -> None:
        backward(loss)
        meter.losses.append(loss.detach())
        if meter.grad_norm is None:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            meter.grad_norm = float(torch.nn.utils.get_total_norm(grads))

    trainer.accelerator.backward = watched
    trainer.add_callback(Stamp(meter))
    meter.loaded(trainer.model, trainer.ref_model, trainer.reward_model)
    meter.stamp()
    trainer.train()
    rows = load_tokens(scratch)
    meter.steps = iterations(rows, settings.batch_size, settings.response_length)[:count]
    meter.save(out, examples=digest([[row["prompt"]] for row in rows]), case="ppo", side="trl", variant=variant)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), "--forced" in sys.argv)
