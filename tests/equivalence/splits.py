"""The same ten optimizer steps on real records, split in many ways; what comes out is compared with the whole.

usage: splits.py DATA MODEL OUT [--devices N --accumulate K --strategy S]      every stage; under torchrun if N > 1
       splits.py DATA MODEL OUT --table      the table of the documentation, and OUT as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from lightning.pytorch import Trainer, seed_everything  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import lit_align.losses as losses  # noqa: E402
from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule  # noqa: E402
from lit_align import strategies  # noqa: E402, F401 (registers fsdp2)
from lit_align.models.source import ModelSource  # noqa: E402
from lit_align.rollout.estimators import GAE  # noqa: E402
from lit_align.rollout.rewards import RewardFunction  # noqa: E402
from lit_align.rollout.sampling import Sampling  # noqa: E402
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings  # noqa: E402

STEPS = 10
STAGES = {"pt": LitPretrain, "sft": LitSFT, "rm": LitReward, "dpo": LitDPO, "ppo": LitPPO}
ALONE = [
    name
    for name, kind in vars(losses).items()
    if isinstance(kind, type)
    and issubclass(kind, losses.PreferenceLoss)
    and kind not in (losses.PreferenceLoss, losses.Sigmoid)
    and not kind.couples_pairs
]
"""Losses of the DPO family whose value of a pair depends on that pair alone."""


@dataclass(frozen=True)
class Split:
    """A way to split the work.

    Attributes:
        name: In the table.
        accumulate: Micro-batches per rank.
        devices: Processes.
        strategy: How they share the work.
        data: Settings of the data module.
        model: Settings of the networks.
    """

    name: str
    accumulate: int = 1
    devices: int = 1
    strategy: str = "ddp"
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


WHOLE = Split("one micro-batch")
SPLITS = (
    Split("8 micro-batches", accumulate=8),
    Split("padded, right", data={"layout": "padded"}),
    Split("padded, left, 3 micro-batches", accumulate=3, data={"layout": "padded", "padding_side": "left"}),
    Split("activation checkpointing", model={"gradient_checkpointing": True}),
)
RANKS = (
    Split("2 processes", devices=2),
    Split("2 processes, 4 micro-batches each", accumulate=4, devices=2),
    Split("2 processes, sharded, 4 micro-batches each", accumulate=4, devices=2, strategy="fsdp2"),
)
FEW = {"batch_size": 5}
"""Fewer examples than there are parts: some micro-batches hold nothing."""
EMPTY = Split("8 micro-batches of 5 examples, 3 of them empty", accumulate=8, data=FEW)
TOKENS = {"batch_size": None, "max_tokens": 1500}
BY_TOKENS = Split("steps of at most 1500 tokens, 8 micro-batches", accumulate=8, data=TOKENS)


def variety(prompts: list[str], answers: list[str], records: list[dict]) -> list[float]:
    """Reward: many different characters."""
    return [len(set(answer)) / 4 for answer in answers]


def data_of(stage: str, data: Path, model: str, split: Split) -> Any:
    """The stage's data module on real records, ragged and cut to 256 tokens."""
    options = {"tokenizer": model, "batch_size": 8, "seed": 3, **split.data}
    if stage == "pt":
        return PretrainDataModule(train=str(data / "pretrain" / "fever.txt"), block_size=128, **options)
    options |= {"max_length": 256, "overlong": "truncate", "on_error": "skip"}
    if stage == "sft":
        files = [str(data / "sft" / name) for name in ("medical_sft.jsonl", "sharegpt_zh.jsonl", "toolcall_zh.jsonl")]
        return SFTDataModule(train=files, **options)
    if stage == "ppo":
        return PromptDataModule(train=str(data / "prompts" / "medical_qa.jsonl"), **options)
    return PreferenceDataModule(train=str(data / "preference" / "dpo_zh.jsonl"), **options)


def stage_of(stage: str, loss: str | None, model: str, split: Split) -> Any:
    """The stage; PPO with every term of its loss and both whitenings.

    Adam's eps is 1e-5, as PPO's papers have it: with 1e-8 it makes whole steps of gradients that are rounding alone.
    """
    options: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-4, eps=1e-5)}
    if loss is not None:
        options["loss"] = getattr(losses, loss)()
    if stage == "ppo":
        options |= {
            "reward_functions": [RewardFunction(variety)],
            "estimator": GAE(whiten_rewards=True),
            "ppo": PPOSettings(
                ppo_epochs=2, num_minibatches=2, num_answers=2, entropy_coef=0.01, kl_loss_coef=0.1, target_kl=1.0
            ),
            "sampling": Sampling(max_new_tokens=16, batch_size=8),
        }
    return STAGES[stage](ModelSource(path=model, **split.model), **options)


def run(stage: str, data: Path, model: str, split: Split, loss: str | None = None) -> dict[str, Any]:
    """Ten steps: every value that is logged, step by step, and the weights afterwards."""
    seed_everything(0, verbose=False)
    module = stage_of(stage, loss, model, split)
    logged: dict[str, list[float]] = {}
    module.log = lambda name, value, **_: logged.setdefault(name, []).append(float(value))
    trainer = Trainer(
        accelerator="cpu",
        devices=split.devices,
        strategy=split.strategy if split.devices > 1 else "auto",
        accumulate_grad_batches=split.accumulate,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, datamodule=data_of(stage, data, model, split))
    weights = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.state_dict().items()}
    return {"logged": logged, "weights": weights}


def difference(whole: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences: of losses, of gradient norms, of all that is logged, of the weights.

    Losses and norms step by step; weights by the largest of their tensor; logged values by the largest of their series,
    or by 1 if that is larger: a reward of 0.01 is the difference of two log-probabilities of hundreds of nats.
    """
    assert whole["logged"].keys() == other["logged"].keys() and whole["weights"].keys() == other["weights"].keys()
    series = {name: (torch.tensor(v).double(), torch.tensor(other["logged"][name]).double())
              for name, v in whole["logged"].items()}  # fmt: skip
    assert all(len(a) == len(b) == STEPS for a, b in series.values())

    def step_by_step(name: str) -> float:
        a, b = series[name]
        return float(((a - b).abs() / a.abs()).max())

    def by_largest(a: torch.Tensor, b: torch.Tensor, least: float) -> float:
        return float((a - b).abs().max() / a.abs().max().clamp(min=least))

    return {
        "loss": step_by_step("train/loss"),
        "gradient norm": step_by_step("train/grad_norm"),
        "logged": max(by_largest(a, b, 1.0) for a, b in series.values()),
        "weights": max(by_largest(a, other["weights"][name], 1e-30) for name, a in whole["weights"].items()),
    }


def run_on_ranks(data: Path, model: str, split: Split) -> dict[str, dict[str, Any]]:
    """Every stage in real processes; all ranks have to end with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks"
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={split.devices}", "--standalone", __file__]
        done = subprocess.run(
            [
                sys.executable,
                *launch,
                data,
                model,
                out,
                f"--devices={split.devices}",
                f"--accumulate={split.accumulate}",
                f"--strategy={split.strategy}",
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        first, *others = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(split.devices)]
    for stage, result in first.items():
        for other in others:
            for name, value in result["weights"].items():
                assert torch.equal(value, other[stage]["weights"][name]), f"{stage}: {name} differs between the ranks"
    return first


def table(data: Path, model: str, out: Path) -> None:
    """Measures everything, prints the table and writes the figures as JSON."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    ranks = {split.name: run_on_ranks(data, model, split) for split in RANKS}
    for stage in STAGES:
        whole = run(stage, data, model, WHOLE)
        few = run(stage, data, model, Split("", data=FEW))
        rows[stage] = {split.name: difference(whole, run(stage, data, model, split)) for split in SPLITS}
        rows[stage] |= {name: difference(whole, results[stage]) for name, results in ranks.items()}
        rows[stage][EMPTY.name] = difference(few, run(stage, data, model, EMPTY))
        if stage != "ppo":
            whole = run(stage, data, model, Split("", data=TOKENS))
            rows[stage][BY_TOKENS.name] = difference(whole, run(stage, data, model, BY_TOKENS))
    for loss in ALONE:
        whole = run("dpo", data, model, WHOLE, loss)
        rows[f"dpo, {loss}"] = {s.name: difference(whole, run("dpo", data, model, s, loss)) for s in SPLITS[:2]}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    out.write_text(json.dumps({"versions": versions, "steps": STEPS, "differences": rows}, indent=2) + "\n")
    print_table(rows)


def print_table(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """The worst figure of each split of each stage, and of each other loss of DPO."""
    names = list(dict.fromkeys(name for stage in STAGES for name in rows[stage]))
    print(f"| split | {' | '.join(STAGES)} |\n|---|{'---|' * len(STAGES)}")
    for name in names:
        cells = (f"{max(rows[s][name].values()):.1e}" if name in rows[s] else "" for s in STAGES)
        print(f"| {name} | {' | '.join(cells)} |")
    for stage in rows.keys() - STAGES.keys():
        print(f"{stage}: {max(value for found in rows[stage].values() for value in found.values()):.1e}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        table(args.data, args.model, args.out)
        return
    split = Split("", args.accumulate, args.devices, args.strategy)
    results = {stage: run(stage, args.data, args.model, split) for stage in STAGES}
    torch.save(results, f"{args.out}.{os.environ.get('RANK', 0)}")


if __name__ == "__main__":
    main()
