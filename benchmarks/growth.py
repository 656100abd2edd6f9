"""How cost grows: seconds of a step against tokens, vocabulary and answers; the head's memory against its logits.

Usage: python -m benchmarks.growth [--smoke]

Small random models under a real stage and trainer. Each curve has four sizes; its exponent is fitted through their
logarithms and stands beside the one that the formula of useful operations (or the algorithm) asks for. An exponent
that is clearly larger means work or memory that should not be there.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import flops
from benchmarks.meter import Meter, machine, memory, reset_high_water, versions
from benchmarks.settings import REPOSITORY, Settings
from benchmarks.stats import median, slope

MODEL = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 4, "intermediate_size": 768, "max_position_embeddings": 8192}
TINY = {**MODEL, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"intermediate_size": 64}


def step_seconds(config: dict[str, Any], examples: Sequence[Any], steps: int) -> float:
    """Median seconds of an optimizer step on these examples, all of them in one step."""
    from benchmarks.ours import Measure, TokenData, optimisation, trainer_of
    from lit_align import LitSFT, ModelSource

    settings = Settings(warmup=2, steps=steps, lr=1e-6)
    torch.manual_seed(0)
    meter = Meter()
    data = TokenData(list(examples) * (settings.warmup + steps), len(examples))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(Path(folder))
        stage = LitSFT(ModelSource(config=config, tokenizer=folder), **optimisation(settings))
        trainer_of(settings, Measure(meter, ("policy",))).fit(stage, data)
    return median(meter.as_dict()["seconds"][settings.warmup :])


def tokenizer(folder: Path) -> None:
    """The smallest one that a model folder can have."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)


def documents(number: int, size: int, vocabulary: int) -> list[Any]:
    """Documents of random ids, every token trained."""
    from lit_align.batch import Branch, Example

    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(2, vocabulary, (number, size), generator=generator)
    return [Example(row[:0], (Branch(row, torch.ones(size)),)) for row in rows]


def answers(number: int, prompt: int, size: int, vocabulary: int) -> list[Any]:
    """One prompt of random ids with so many answers."""
    from lit_align.batch import Branch, Example

    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(2, vocabulary, (prompt,), generator=generator)
    rows = torch.randint(2, vocabulary, (number, size), generator=generator)
    return [Example(ids, tuple(Branch(row, torch.ones(size)) for row in rows))]


def against(
    cost: str, name: str, sizes: Sequence[int], measure: Callable[[int], float], expected: Callable[[int], float]
) -> dict[str, Any]:
    """One curve; `expected` gives the cost that it should be proportional to."""
    costs = [measure(size) for size in sizes]
    wanted = [expected(size) for size in sizes]
    curve = {"cost": cost, "against": name, "sizes": list(sizes), "costs": costs}
    curve |= {"slope": slope(sizes, costs), "expected": slope(sizes, wanted)}
    print(f"{cost} against {name}: {curve['slope']:.2f}, expected {curve['expected']:.2f}", flush=True)
    return curve


def needed(config: dict[str, Any], prompt: int, branches: Sequence[int], scored: int) -> float:
    """Useful operations of one example's step."""
    return float(flops.example(flops.Shape.of(config), "sft", prompt, branches, scored))


def time_curves(smoke: bool) -> list[dict[str, Any]]:
    """Seconds of a step against tokens, length, vocabulary, and answers to one prompt."""
    steps, base, scale = (2, TINY, 16) if smoke else (5, MODEL, 1)
    config = {**base, "vocab_size": 8192 // scale}
    wide = {**config, "num_hidden_layers": 1}
    size, prompt, answer = 256 // scale, 1024 // scale, 128 // scale

    def document(number: int, length: int, used: dict[str, Any]) -> float:
        return step_seconds(used, documents(number, length, used["vocab_size"]), steps)

    return [
        against(
            "seconds of a step",
            f"documents of {size} tokens",
            (8, 16, 32, 64),
            lambda n: document(n, size, config),
            lambda n: n * needed(config, 0, [size], size - 1),
        ),
        against(
            "seconds of a step",
            "tokens of one document",
            tuple(n // scale for n in (512, 1024, 2048, 4096)),
            lambda n: document(1, n, config),
            lambda n: needed(config, 0, [n], n - 1),
        ),
        against(
            "seconds of a step",
            "vocabulary",
            tuple(n // scale for n in (16384, 32768, 65536, 131072)),
            lambda v: document(4, size, {**wide, "vocab_size": v}),
            lambda v: 4 * needed({**wide, "vocab_size": v}, 0, [size], size - 1),
        ),
        against(
            "seconds of a step",
            f"answers of {answer} tokens to one prompt of {prompt}",
            (1, 2, 4, 8),
            lambda n: step_seconds(config, answers(n, prompt, answer, config["vocab_size"]), steps),
            lambda n: needed(config, prompt, [answer] * n, answer * n),
        ),
    ]


def head_memory(rows: int, vocabulary: int) -> int:
    """Bytes above model, gradients and hidden states that the head's forward and backward pass need; fresh processes.

    All rows are scored; what has to be there (weights, their gradient, hidden states and theirs) is not counted.
    """
    command = [sys.executable, "-m", "benchmarks.growth", "--head", str(rows), str(vocabulary)]
    runs = [subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True) for _ in range(3)]
    # The least of three: the allocator may keep a block that it could have used again. Less than 1 MiB is nothing.
    return max(min(int(done.stdout.split()[-1]) for done in runs), 2**20)


def measure_head(rows: int, vocabulary: int) -> int:
    """What `head_memory` says, measured in this process."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lit_align.models.head import head_stats

    values = {key: value for key, value in TINY.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values, vocab_size=vocabulary, tie_word_embeddings=True))
    hidden = torch.randn(rows, TINY["hidden_size"]).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    weight = model.get_output_embeddings().weight
    weight.grad, hidden.grad = torch.zeros_like(weight).fill_(0.5), torch.zeros_like(hidden).fill_(0.5)
    head_stats(model, hidden[:8], targets[:8]).logps.sum().backward()  # libraries allocate at first use
    reset_high_water()
    before = memory("VmRSS")
    head_stats(model, hidden, targets).logps.sum().backward()
    return memory("VmHWM") - before


def memory_curves(smoke: bool) -> list[dict[str, Any]]:
    """Peak memory of the head against scored tokens and against the vocabulary: flat, for few logits are kept."""
    scale = 8 if smoke else 1
    rows = tuple(n // scale for n in (4096, 8192, 16384, 32768))
    vocabularies = tuple(n // scale for n in (8192, 16384, 32768, 65536))
    return [
        against(
            "peak memory of the head",
            f"scored tokens, vocabulary {32768 // scale}",
            rows,
            lambda n: float(head_memory(n, 32768 // scale)),
            lambda n: 1.0,
        ),
        against(
            "peak memory of the head",
            f"vocabulary, {8192 // scale} scored tokens",
            vocabularies,
            lambda v: float(head_memory(8192 // scale, v)),
            lambda v: 1.0,
        ),
    ]


def main() -> int:
    """All curves."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="tiny sizes, and no result is written")
    made.add_argument("--threads", type=int, default=Settings.threads)
    made.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    made.add_argument("--head", type=int, nargs=2, metavar=("ROWS", "VOCABULARY"), help="measure this and print it")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.head:
        print(measure_head(*options.head))
        return 0
    curves = time_curves(options.smoke) + memory_curves(options.smoke)
    if not options.smoke:
        result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(), "curves": curves}
        result |= {"command": "python -m benchmarks.growth", "threads": options.threads}
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "growth.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
