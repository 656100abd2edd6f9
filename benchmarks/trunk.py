"""Memory of PPO's four roles on one trunk, beside four networks: the same prompts, settings and reward adapter.

    python -m benchmarks.trunk --model models/smollm2-135m-instruct --out benchmarks/results/trunk.json

Each run is a process of its own, the ways in turn. It imports everything, notes what it holds (the baseline), builds
the networks, and makes an iteration of PPO (one rollout and two steps). Reported: the most that it held above
the baseline, the same above what it held when training began, bytes of parameters (a shared one once), and seconds.

The allocator gives freed memory back at once, as in `benchmarks.memory`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import GIVES_BACK
from benchmarks.meter import machine, memory, reset_high_water, versions
from benchmarks.settings import BARE, REPOSITORY

PROMPTS = "datamodules/demo/corpus/queries.train.jsonl"
WAYS = ("four networks", "four networks with adapters", "one trunk")
"""All weights trained; adapters on two copies, the reward model folded; adapters on one base."""
ITERATIONS = 1


def reward_adapter(model: str, folder: Path) -> None:
    """An adapter folder as the `rm` stage would export it, of random numbers."""
    import torch

    from lit_align.models.export import export_module
    from lit_align.models.load import load_scalar_model, load_tokenizer
    from lit_align.models.source import LoraSettings, ModelSource

    torch.manual_seed(0)
    source = ModelSource(path=model, lora=LoraSettings())
    network = load_scalar_model(source)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    export_module(network, load_tokenizer(source), folder, for_trunk=True)


def stage_of(way: str, model: str, adapter: str) -> Any:
    """The stage; with adapters these have rank 16 on every linear layer."""
    from lit_align.models.source import LoraSettings, ModelSource
    from lit_align.rollout.sampling import Sampling
    from lit_align.stages import LitPPO
    from lit_align.stages.ppo_settings import PPOSettings

    lora = None if way == WAYS[0] else LoraSettings()
    own = ModelSource(path=model, lora=lora)
    return LitPPO(
        own,
        reward_model=ModelSource(path=adapter),
        critic=own,
        shared_trunk=way == WAYS[2],
        ppo=PPOSettings(ppo_epochs=1, num_minibatches=2, num_answers=2),
        sampling=Sampling(max_new_tokens=24, batch_size=16),
    )


def measure(way: str, model: str, adapter: str, out: Path) -> None:
    """Runs one way in this process."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from datamodules import PromptDataModule

    class Scale(Callback):
        """What the process holds when training begins, and how long the iteration takes."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.begin, self.stamps = memory("VmRSS"), [time.perf_counter()]

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.stamps.append(time.perf_counter())

    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    stage, scale = stage_of(way, model, adapter), Scale()
    import peft  # noqa: F401 (before the baseline: all ways begin with the same libraries)

    data = PromptDataModule(train=PROMPTS, tokenizer=model, batch_size=8, max_length=256)
    gc.collect()
    reset_high_water()
    baseline = memory("VmRSS")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=ITERATIONS,
        gradient_clip_val=1.0,
        callbacks=[scale],
        **BARE,
    )
    trainer.fit(stage, datamodule=data)
    peak, parameters = memory("VmHWM"), list(stage.parameters())
    found = {
        "peak_bytes": peak - baseline,
        "peak_bytes_above_start_of_training": peak - scale.begin,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "trained_parameter_bytes": sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        "seconds": [after - before for before, after in zip(scale.stamps, scale.stamps[1:], strict=False)],
    }
    out.write_text(json.dumps(found), encoding="utf-8")


def in_process(options: Sequence[str]) -> None:
    """Runs this file in a fresh process."""
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | GIVES_BACK
    )
    command = [sys.executable, "-m", "benchmarks.trunk", *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(options)}: exit status {done.returncode}\n{done.stderr[-2000:]}")


def main(args: Sequence[str] | None = None) -> int:
    """Measures all ways in turn, several rounds of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trunk")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trunk.json"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", help="run this one in this process; 'adapter' makes the reward adapter")
    parser.add_argument("--adapter", default="")
    options = parser.parse_args(args)
    if options.way == "adapter":
        reward_adapter(options.model, Path(options.adapter))
        return 0
    if options.way:
        measure(options.way, options.model, options.adapter, options.out)
        return 0
    runs: dict[str, list[Any]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        common = [f"--model={Path(options.model).resolve()}", f"--adapter={folder}/adapter", f"--out={folder}/out.json"]
        in_process(["--way=adapter", *common])
        for _ in range(options.rounds):
            for way in WAYS:
                in_process([f"--way={way}", *common])
                runs[way].append(json.loads(Path(f"{folder}/out.json").read_text(encoding="utf-8")))
                print(f"{way:30}{runs[way][-1]['peak_bytes'] / 2**20:8.0f} MiB", flush=True)
                write(options.out, Path(options.model).name, runs)
    return 0


def write(out: Path, model: str, runs: dict[str, list[Any]]) -> None:
    """All runs so far, with what they were made on."""
    settings = {"iterations": ITERATIONS, "prompts": 8, "answers": 2, "max_new_tokens": 24, "lora_rank": 16}
    content = {"versions": versions(), "machine": machine(), "model": model} | settings
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content | {"runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
