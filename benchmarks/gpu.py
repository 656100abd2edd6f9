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
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops
from benchmarks.growth import tokenizer
from benchmarks.meter import Meter, machine, matrix_rate, versions
from benchmarks.settings import Settings
from benchmarks.stats import median, percentile

_QWEN = {"model_type": "qwen3", "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
_QWEN |= {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**_QWEN, "hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {**_QWEN, "hidden_size": 2048, "intermediate_size": 6144},
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Setup:
    """Where and how large.

    Attributes:
        device: "cuda" or "cpu".
        dtype: Of weights and arithmetic.
        tiny: Small stand-ins for every size.
        floor: FLOP/s of a large matrix product on this device.
        folder: Of the smallest tokenizer.
    """

    device: str
    dtype: torch.dtype
    tiny: bool
    floor: float
    folder: Path

    def config(self, name: str) -> dict[str, Any]:
        """Of a model."""
        return {**CONFIGS[name], **TINY} if self.tiny else CONFIGS[name]

    def size(self, number: int) -> int:
        """Of tokens."""
        return max(8, number // 64) if self.tiny else number

    def source(self, name: str, lora: bool = False) -> Any:
        """Random weights of a real configuration."""
        from lit_align import LoraSettings, ModelSource

        dtype = str(self.dtype).removeprefix("torch.")
        adapters = LoraSettings(r=16) if lora else None
        return ModelSource(config=self.config(name), tokenizer=str(self.folder), dtype=dtype, lora=adapters)


def timed(setup: Setup, work: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Milliseconds of one call (median, p10, p90; CUDA events), and bytes above what was there before."""
    samples = []
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for number in range(warmup + (2 if setup.tiny else repeats)):
        if setup.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            sample = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            work()
            sample = 1000 * (time.perf_counter() - start)
        if number >= warmup:
            samples.append(sample)
    found = {"ms": median(samples), "p10": percentile(samples, 0.1), "p90": percentile(samples, 0.9)}
    if setup.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


# -- training steps


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
    scored = sum(branches) - (not prompt)
    whole = flops.example(flops.Shape.of(config), one.stage, prompt, branches, scored)
    passes = flops.PASSES["train"] + (one.stage == "dpo")
    return whole * (passes - one.lora) / passes


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


# -- parts


def attention(setup: Setup) -> dict[str, Any]:
    """Forward and backward of one layer's attention: documents in a packed row, or a batch for SDPA's kernels."""
    from benchmarks.packed import attention_arguments
    from lit_align.models.attention import packed_attention

    heads, kv_heads, width, found = 16, 8, 128 if not setup.tiny else 8, {}
    for length in map(setup.size, (512, 2048, 4096)):
        documents = max(1, setup.size(16384) // length)
        given = attention_arguments([length] * documents, setup.device)

        def random(rows: int, number: int, columns: int) -> Tensor:
            made = torch.randn(rows, number, columns, width, device=setup.device, dtype=setup.dtype)
            return made.requires_grad_()

        row = [random(1, n, documents * length) for n in (heads, kv_heads, kv_heads)]
        batch = [random(documents, n, length) for n in (heads, kv_heads, kv_heads)]
        ways: dict[str, Callable[[], Tensor]] = {
            "packed": lambda row=row, given=given: packed_attention(torch.nn.Module(), *row, None, **given)[0]
        }
        for name, backend in backends(setup).items():
            ways[name] = lambda batch=batch, backend=backend: causal(batch, backend)
        needed = 3 * 2 * heads * width * documents * length**2
        for name, way in ways.items():
            cost = timed(setup, lambda way=way: way().sum().backward())
            found[f"{name}, {documents} x {length}"] = cost | {
                "ratio_to_floor": needed / setup.floor / (cost["ms"] / 1000)
            }
    return found


def backends(setup: Setup) -> dict[str, Any]:
    """SDPA's kernels for a dense causal batch."""
    from torch.nn.attention import SDPBackend

    if setup.device == "cpu":
        return {"SDPA": None}
    return {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


def causal(batch: Sequence[Tensor], backend: Any) -> Tensor:
    """Causal attention by one kernel."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with nullcontext() if backend is None else sdpa_kernel([backend]):
        return scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)


def head(setup: Setup) -> dict[str, Any]:
    """Forward and backward of the vocabulary projection: this project's, and logits with cross-entropy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_align.models.head import head_stats

    config = {**setup.config("Qwen3-0.6B"), "num_hidden_layers": 1}
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **values)
    model = AutoModelForCausalLM.from_config(made, dtype=setup.dtype).to(setup.device)
    weight, found = model.get_output_embeddings().weight, {}
    for rows in map(setup.size, (2048, 8192)):
        hidden = torch.randn(rows, config["hidden_size"], device=setup.device, dtype=setup.dtype).requires_grad_()
        targets = torch.randint(0, config["vocab_size"], (rows,), device=setup.device)
        ways = {
            "ours": lambda h=hidden, t=targets: head_stats(model, h, t).logps.sum(),
            "plain": lambda h=hidden, t=targets: torch.nn.functional.cross_entropy(
                torch.nn.functional.linear(h, weight).float(), t, reduction="sum"
            ),
        }
        needed = 3 * flops.head(flops.Shape.of(config), rows)
        for name, way in ways.items():
            cost = timed(setup, lambda way=way: way().backward())
            found[f"{name}, {rows} rows"] = cost | {"ratio_to_floor": needed / setup.floor / (cost["ms"] / 1000)}
    return found


def decode(setup: Setup) -> dict[str, Any]:
    """Answers of a forced length: this project's sampling, and `generate`."""
    from transformers import GenerationConfig

    from benchmarks.ours_ppo import NEVER, sampler
    from lit_align.models.load import load_causal_lm
    from lit_align.rollout.sampling import Sampling

    model, found = load_causal_lm(setup.source("Qwen3-0.6B")).to(setup.device), {}
    prompt, length = setup.size(256), setup.size(256)
    for batch in (2,) if setup.tiny else (64, 256):
        ids = torch.randint(2, model.config.vocab_size, (batch, prompt), device=setup.device)
        forced = GenerationConfig(max_new_tokens=length, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
        settings = Sampling(max_new_tokens=length, batch_size=batch)
        ways = {
            "ours": lambda ids=ids, settings=settings: sampler()(model, list(ids), [NEVER], settings),
            "generate": lambda ids=ids, forced=forced: model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=forced
            ),
        }
        for name, way in ways.items():
            cost = timed(setup, way, repeats=3, warmup=1)
            found[f"{name}, {batch} answers"] = cost | {"tokens_per_second": 1000 * batch * length / cost["ms"]}
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
