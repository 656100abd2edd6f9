"""Compares what `lit-align plan` says of memory with what a run takes on a CPU, each case in a process of its own.

    python -m benchmarks.memory --out benchmarks/results/plan.json

A case is a configuration of a model with random weights. Its process builds what `fit` would build, notes how much it
holds when training begins (interpreter, libraries, weights, data), makes some optimizer steps, and takes the most that
it has held since. Measured = that less what was held at the beginning, plus the weights, whose size is known exactly.

By default the allocator is told to give freed memory back at once (`MALLOC_MMAP_THRESHOLD_`), so that the process' size
follows what is alive; with its own settings it keeps some, and the figures wander: some cases are measured both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.meter import machine, memory, reset_high_water, versions
from benchmarks.settings import BARE, REPOSITORY

TOKENIZER = "models/smollm2-135m-instruct"
STEPS = 3
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 8},
    "middle": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
}
"""Shapes of Llama with the vocabulary of the tokenizer (49152 entries) and tied embeddings: 22, 50 and 135 million."""
KEY_HEADS = {"small": 4, "middle": 3, "135M": 3}
LORA = "--model.policy.lora.r=16"
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sft 22M": ("sft", "small", ("--data.batch_size=24",)),
    "sft 50M": ("sft", "middle", ("--data.batch_size=24",)),
    "sft 135M": ("sft", "135M", ("--data.batch_size=12",)),
    "sft 135M, gradient checkpointing": (
        "sft",
        "135M",
        ("--data.batch_size=24", "--model.policy.gradient_checkpointing=true"),
    ),
    "sft 50M, 4 micro-batches": ("sft", "middle", ("--data.batch_size=48", "--trainer.accumulate_grad_batches=4")),
    "sft 50M, bf16-mixed": ("sft", "middle", ("--data.batch_size=24", "--trainer.precision=bf16-mixed")),
    "sft 50M, dtype bfloat16": ("sft", "middle", ("--data.batch_size=24", "--model.policy.dtype=bfloat16")),
    "sft 135M, LoRA": ("sft", "135M", ("--data.batch_size=24", LORA)),
    "dpo 50M": ("dpo", "middle", ("--data.batch_size=12",)),
    "dpo 50M, LoRA": ("dpo", "middle", ("--data.batch_size=12", LORA)),
    "rm 50M": ("rm", "middle", ("--data.batch_size=12",)),
    "ppo 22M": ("ppo", "small", ("--data.batch_size=8",)),
    "ppo 50M": ("ppo", "middle", ("--data.batch_size=8",)),
}
"""Stage, size, options."""
DEFAULT_TOO = ("sft 22M", "sft 135M, LoRA", "ppo 22M")
"""Measured with the allocator's own settings too."""


def arguments(case: str, folder: Path) -> list[str]:
    """The options of the command line that a case stands for."""
    stage, size, options = CASES[case]
    config: dict[str, Any] = {"model_type": "llama", **SIZES[size], "num_key_value_heads": KEY_HEADS[size]}
    source = {"config": config | {"tie_word_embeddings": True}, "tokenizer": TOKENIZER}
    roles = {"rm": ["reward_model"], "ppo": ["policy", "reward_model"]}.get(stage, ["policy"])
    model: dict[str, Any] = {"class_path": f"Lit{'Reward' if stage == 'rm' else stage.upper()}"}
    model["init_args"] = {role: source for role in roles}
    if stage == "ppo":
        model["init_args"] |= {
            "ppo": {"ppo_epochs": 2, "num_minibatches": 1, "num_answers": 4},
            "sampling": {"max_new_tokens": 48, "batch_size": 32},
        }
    data = {"sft": "SFT", "dpo": "Preference", "rm": "Preference", "ppo": "Prompt"}[stage]
    files = {"sft": "sft", "dpo": "preference", "rm": "preference", "ppo": "queries"}[stage]
    content = {
        "model": model,
        "data": {
            "class_path": f"{data}DataModule",
            "init_args": {"train": f"datamodules/demo/corpus/{files}.train.jsonl", "max_length": 512},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "precision": "32-true"},
    }
    file = folder / "case.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    return ["--config", str(file), *options]


def measure(case: str, out: Path) -> None:
    """Runs a case in this process, and writes what was planned and what was measured."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from lit_align.cli.budget import budget_of
    from lit_align.cli.plan import PlanCLI, situation_of
    from lit_align.cli.plugins import import_classes
    from lit_align.cli.workload import seconds
    from lit_align.machine import this_machine

    class Scale(Callback):
        """What the process holds when training begins, and when each step ends."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            reset_high_water()
            self.begin, self.stamps = memory("VmRSS"), [time.perf_counter()]

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.stamps.append(time.perf_counter())

    packages = import_classes()
    cli = PlanCLI(["fit", *arguments(case, out.parent)], packages)
    settings = cli.trainer_settings
    situation, data = situation_of(cli.stage, cli.data, settings)
    budget = budget_of(situation)
    seed_everything(0, verbose=False)
    scale = Scale()
    trainer = Trainer(
        **{name: settings[name] for name in ("accelerator", "devices", "precision", "accumulate_grad_batches")},
        max_steps=STEPS if settings["accumulate_grad_batches"] == 1 else 2,
        gradient_clip_val=1.0,
        callbacks=[scale],
        **BARE,
    )
    trainer.fit(cli.stage, datamodule=cli.data)
    peak = memory("VmHWM")
    weights = sum(role.weights.total_bytes for role in situation.roles)
    import torch

    dtype = torch.bfloat16 if "bf" in f"{settings['precision']} {situation.trained[0].source.dtype}" else torch.float32
    floor = seconds(situation, cli.stage, data, data.workload(settings), this_machine(torch.device("cpu"), dtype), 0)
    found = {
        "planned_bytes": budget.peak,
        "measured_bytes": peak - scale.begin + weights,
        "weights_bytes": weights,
        "phase": budget.peak_phase,
        "held": budget.held,
        "phases": budget.phases,
        "largest_micro_batch": vars(situation.largest()),
        "floor_seconds_of_a_step": floor.step,
        "seconds_between_micro_batches": [b - a for a, b in zip(scale.stamps, scale.stamps[1:], strict=False)],
    }
    out.write_text(json.dumps(found), encoding="utf-8")


def in_process(case: str, gives_back: bool) -> dict[str, Any]:
    """Runs a case in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        environment |= GIVES_BACK if gives_back else {}
        command = [sys.executable, "-m", "benchmarks.memory", "--case", case, "--out", str(out)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{case}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def main(args: Sequence[str] | None = None) -> int:
    """Runs all cases, or those whose names are given; results of others in the file stay."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.json"))
    parser.add_argument("--case", help="run this one in this process")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    options = parser.parse_args(args)
    if options.case:
        measure(options.case, options.out)
        return 0
    known = json.loads(options.out.read_text(encoding="utf-8"))["cases"] if options.out.is_file() else {}
    for case in options.only:
        found = in_process(case, gives_back=True)
        planned, said = found["planned_bytes"], ""
        if case in DEFAULT_TOO:
            kept = found["measured_bytes_default_allocator"] = in_process(case, gives_back=False)["measured_bytes"]
            said = f" ({planned / kept:.3f} with the allocator's own settings)"
        known[case] = found
        ratio = planned / found["measured_bytes"]
        print(f"{case:40}{planned / 2**20:10.0f} MiB planned, {ratio:.3f} of measured{said}", flush=True)
        content = {"versions": versions(), "machine": machine(), "steps": STEPS, "cases": known}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
