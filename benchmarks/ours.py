"""Our side: a stage under a Lightning `Trainer`, as users have it. One process measures one case.

Usage: python -m benchmarks.ours CASE SCRATCH OUT.json [--forced]
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.meter import Meter, digest
from benchmarks.prepare import as_dict, as_example, data_module
from benchmarks.settings import BARE, CASES, Case, Settings
from benchmarks.tokens import load_tokens, signature, unique_tokens
from lit_align import LitDPO, LitReward, LitSFT, ModelSource
from lit_align.batch import Example, PlannedLoader, pack


class TokenData(LightningDataModule):
    """Examples that are token ids already, in their own order, through the project's loader and packing."""

    def __init__(self, examples: list[Example], batch_size: int) -> None:
        super().__init__()
        self.datasets = {"train": examples}
        self.batch_size = batch_size

    def train_dataloader(self) -> PlannedLoader:
        """Packed micro-batches, one a step."""
        examples = self.datasets["train"]
        return PlannedLoader(
            examples,
            lambda chosen, plan: pack(chosen, plan.indices, plan.totals),
            lengths=np.array([len(example) for example in examples]),
            trained_weights=np.array([example.trained_weight for example in examples]),
            batch_size=self.batch_size,
            shuffle=False,
        )


class Measure(Callback):
    """Stamps the end of every step; keeps losses, the first gradient norm, and which examples each step held."""

    def __init__(self, meter: Meter, networks: tuple[str, ...]) -> None:
        self.meter, self.networks = meter, networks
        self.indices: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, stage: Any) -> None:
        """All networks are built and on their device."""
        self.meter.loaded(*(net for name in self.networks if (net := getattr(stage, name, None)) is not None))
        self.meter.stamp()

    def on_before_optimizer_step(self, trainer: Trainer, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        """The gradient norm of the first step, before it is clipped."""
        if self.meter.grad_norm is None:
            grads = [p.grad for p in stage.parameters() if p.grad is not None]
            self.meter.grad_norm = float(torch.nn.utils.get_total_norm(grads))

    def on_train_batch_end(self, trainer: Trainer, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step has ended."""
        self.meter.losses.append(outputs["loss"].detach())
        self.indices.append(batch.indices)
        self.meter.stamp()


def source(folder: Path, settings: Settings, recompute: bool = False) -> ModelSource:
    """Where both sides' weights are."""
    return ModelSource(path=str(folder), dtype=settings.dtype, gradient_checkpointing=recompute)


def optimisation(settings: Settings) -> dict[str, Any]:
    """AdamW and a constant rate, as the peer has them."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        ),
        "lr_scheduler": lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0),
    }


def stage_of(case: Case, settings: Settings, scratch: Path) -> Any:
    """The stage with its defaults."""
    policy, rest = source(scratch / "policy", settings, case.recompute), optimisation(settings)
    if case.stage == "sft":
        return LitSFT(policy, **rest)
    if case.stage == "dpo":
        return LitDPO(policy, **rest)
    return LitReward(source(scratch / "scalar", settings, case.recompute), **rest)


def trainer_of(settings: Settings, *callbacks: Callback, **options: Any) -> Trainer:
    """A trainer that logs, and keeps no checkpoints."""
    defaults: dict[str, Any] = {
        "accelerator": "gpu" if settings.device == "cuda" else "cpu",
        "devices": 1,
        "max_steps": settings.warmup + settings.steps,
        "log_every_n_steps": settings.log_every,
        "gradient_clip_val": settings.clip,
        **BARE,
        "callbacks": list(callbacks),
    }
    return Trainer(**defaults | options)


def measure(case: Case, scratch: Path, out: Path) -> None:
    """Trains the case's steps and writes what they cost."""
    settings = Settings.load(scratch / "settings.json")
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed, verbose=False)
    rows = load_tokens(scratch)
    if case.records:
        data: Any = data_module(case, settings, scratch)
    else:
        data = TokenData([as_example(row) for row in rows], settings.batch_size)
    meter = Meter(settings.device)
    callback = Measure(meter, ("policy", "reference", "reward_model"))
    trainer = trainer_of(settings, callback, logger=CSVLogger(scratch, name="logs"))
    trainer.fit(stage_of(case, settings, scratch), data)
    dataset = data.datasets["train"]
    for indices in callback.indices:
        held = [as_dict(dataset[int(i)]) for i in indices]
        meter.steps.append(
            {"digest": digest(map(signature, held)), "tokens": sum(map(unique_tokens, held)), "examples": len(held)}
        )
    meter.save(out, examples=digest(map(signature, rows)), case=case.name, side="ours", variant="ours")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    name, folder, result = sys.argv[1:4]
    if CASES[name].stage == "ppo":
        from benchmarks.ours_ppo import measure_ppo

        measure_ppo(CASES[name], Path(folder), Path(result), forced="--forced" in sys.argv)
    else:
        measure(CASES[name], Path(folder), Path(result))
