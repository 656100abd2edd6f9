"""One GPU in bf16: training steps against the floor, and the parts that make them up against the alternatives.

Usage: python -m benchmarks.gpu [PART ...] [--results FILE]             (parts: train, attention, head, decode)
       python -m benchmarks.gpu --device cpu --tiny                     (arithmetic and plumbing alone, in seconds)

It has not been run on a GPU yet: there is no figure of it in `results`, and none may be quoted before there is. The
tiny run on a CPU is a test. Models are real configurations with random weights, so nothing is downloaded; token ids are
drawn anew for every step (matrix products of zeros are faster than of numbers). Beside TRL, on a GPU:
`python -m benchmarks.compare sft dpo rm --device cuda --dtype bfloat16`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops
from benchmarks.gpu_parts import attention, decode, head
from benchmarks.gpu_setup import Setup
from benchmarks.growth import tokenizer
from benchmarks.meter import Meter, machine, matrix_rate, versions
from benchmarks.settings import Settings
from benchmarks.stats import median, percentile


@dataclass(frozen=True)
class Training:
    """A training step that is measured.

    Attributes:
        stage: "sft", "dpo" or "rm".
        model: Of `CONFIGS`.
        prompt: Tokens of the prompt.
        branches: Tokens of each answer (SFT: of the conversation).
        examples: Of a step.
        lora: Adapters alone are trained.
    """

    stage: str
    model: str
    prompt: int
    branches: tuple[int, ...]
    examples: int
    lora: bool = False


def _pairs(ratio: float, examples: int, stage: str = "dpo") -> Training:
    answer = round(1024 / (1 + ratio))
    return Training(stage, "Qwen3-1.7B", 1024 - answer, (answer, answer), examples)


TRAININGS = (
    Training("sft", "Qwen3-0.6B", 0, (4096,), 4),
    Training("sft", "Qwen3-1.7B", 0, (4096,), 2),
    Training("sft", "Llama-3.1-8B", 0, (4096,), 1, lora=True),
    _pairs(0.4, 8),
    _pairs(2.0, 8),
    _pairs(4.0, 8),
    _pairs(1.0, 8, "rm"),
)


def training(setup: Setup, one: Training, steps: int = 10) -> dict[str, Any]:
    """Steps of a stage under a trainer: useful tokens/s, ratio to the floor, memory."""
    from benchmarks.ours import Measure, TokenData, optimisation, trainer_of
    from lit_align import LitDPO, LitReward, LitSFT

    settings = Settings(warmup=5, steps=2 if setup.tiny else steps, device=setup.device)
    prompt, branches = setup.size(one.prompt) if one.prompt else 0, tuple(map(setup.size, one.branches))
    count = (settings.warmup + settings.steps) * one.examples
    data = TokenData(drawn(prompt, branches, count, setup.config(one.model)["vocab_size"]), one.examples)
    source = setup.source(one.model, one.lora)
    stage = {"sft": LitSFT, "dpo": LitDPO, "rm": LitReward}[one.stage](source, **optimisation(settings))
    meter = Meter(setup.device)
    networks = ("policy", "reference", "reward_model")
    trainer_of(settings, Measure(meter, networks)).fit(stage, data)
    found = meter.as_dict()
    needed = one.examples * needed_flops(setup.config(one.model), one, prompt, branches)
    tokens = one.examples * (prompt + sum(branches))
    rates = [tokens / seconds for seconds in found["seconds"][settings.warmup :]]
    result = {
        "tokens_per_second": median(rates),
        "p10": percentile(rates, 0.1),
        "p90": percentile(rates, 0.9),
        "ratio_to_floor": needed / setup.floor / (tokens / median(rates)),
        "peak_bytes_above_weights": found["peak_bytes_above_weights"],
        "losses": found["losses"],
    }
    if setup.device == "cuda":
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return result


def needed_flops(config: dict[str, Any], one: Training, prompt: int, branches: Sequence[int]) -> float:
    """Useful operations of one example; with adapters the frozen weights have no gradient: two passes, not three."""
    shape, scored = flops.Shape.of(config), sum(branches) - (not prompt)
    whole = flops.example(shape, one.stage, prompt, branches, scored)
    return whole - one.lora * (flops.matrices(shape, prompt, branches) + flops.head(shape, scored))


def drawn(prompt: int, branches: Sequence[int], count: int, vocabulary: int) -> list[Any]:
    """Examples of random ids."""
    from lit_align.batch import Branch, Example

    def ids(size: int) -> Tensor:
        return torch.randint(2, vocabulary, (size,))

    return [Example(ids(prompt), tuple(Branch(ids(n), torch.ones(n)) for n in branches)) for _ in range(count)]


def train(setup: Setup) -> dict[str, Any]:
    """All training steps."""
    found = {}
    for one in TRAININGS:
        name = f"{one.stage} {one.model}{' LoRA' * one.lora} {one.prompt}+{'+'.join(map(str, one.branches))}"
        found[name] = training(setup, one)
        print(f"{name}: {found[name]['tokens_per_second']:.0f} tokens/s", flush=True)
        if setup.device == "cuda":
            torch.cuda.empty_cache()
    return found


PARTS = {"train": train, "attention": attention, "head": head, "decode": decode}


def main(arguments: list[str] | None = None) -> int:
    """Measures the parts and writes or prints what they cost."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--results", type=Path, help="file for the result; default: it is printed")
    options = made.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; `--device cpu --tiny` tries the plumbing")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rate = matrix_rate(256 if options.tiny else 8192, device=options.device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(Path(folder))
        setup = Setup(options.device, dtype, options.tiny, rate, Path(folder))
        found = {part: PARTS[part](setup) for part in options.parts or PARTS}
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(), "tiny": options.tiny}
    text = json.dumps(result | {"matrix_tflops": rate / 1e12, **found}, indent=1)
    if options.results:
        options.results.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
