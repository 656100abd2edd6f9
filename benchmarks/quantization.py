"""A base in float32, bfloat16, int8 and nf4 side by side: bytes, loss before training, seconds a step, losses of a run.

    python -m benchmarks.quantization --model models/smollm2-135m-instruct --data sft.jsonl --out qlora.json

The same conversations, packed in the same way, for every base; adapters on all of them. One process: the bases take
their steps in turn, so that whatever else the machine does falls on all of them. Seconds are the processor's (run it
with OMP_NUM_THREADS=1), medians, and only their ratios say something on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import machine, versions
from datamodules import SFTDataModule
from lit_align.batch import MicroBatch, StepTotals, pack
from lit_align.models import token_loss
from lit_align.models.adapters import merged_state
from lit_align.models.load import load_causal_lm, load_tokenizer
from lit_align.models.source import LoraSettings, ModelSource

BASES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
}
CONVERSATIONS, HELD_OUT, LENGTH, TIMED, RATE = 1, 4, 96, 6, 1e-3
LEARNS = "nf4"
"""The base that makes all steps; the others make the first `TIMED`."""


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = measure(options.model, options.data, options.steps)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["bases"], indent=2))


def measure(model: str, data: str, steps: int) -> dict[str, Any]:
    """What the bases take and give.

    Returns:
        For each base: bytes of its frozen weights; loss in nats per token on held-out conversations before training; of
        the one that makes all steps also after it, and then with its adapters folded into the weights that they were
        trained on, and with them on the original weights; median seconds a step.
    """
    train, held_out = micro_batches(model, data, steps)
    networks, optimizers, taken = {}, {}, {name: [] for name in BASES}
    losses: dict[str, list[float]] = {name: [] for name in BASES}
    result: dict[str, dict[str, Any]] = {}
    for name, how in BASES.items():
        torch.manual_seed(0)
        networks[name] = load_causal_lm(ModelSource(path=model, lora=LoraSettings(r=16, alpha=32), **how))
        trained = [p for p in networks[name].parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        frozen = (p for p in networks[name].parameters() if not p.requires_grad)
        size = sum(p.untyped_storage().nbytes() for p in frozen)
        result[name] = {"bytes": size, "before": loss_over(networks[name], held_out)}
        print(name, result[name], flush=True)
    for number, batch in enumerate(train):
        for name, network in networks.items():
            if number >= TIMED and name != LEARNS:
                continue
            began = time.process_time()
            losses[name].append(step(network, optimizers[name], batch))
            taken[name].append(time.process_time() - began)
            print(f"{name}: {losses[name][-1]:.4f} in {taken[name][-1]:.1f} s", flush=True)
    for name in networks:
        result[name] |= {"seconds": statistics.median(taken[name][1:TIMED]), "losses": losses[name]}
    result[LEARNS]["after"] = loss_over(networks[LEARNS], held_out)
    result[LEARNS] |= merged_both_ways(networks[LEARNS], networks["float32"], model, held_out)
    return {"bases": result, "steps": steps, "model": model, "machine": machine(), "versions": versions()}


def micro_batches(model: str, data: str, steps: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Packed conversations, cut to `LENGTH` tokens: to train on, a step each, and to look at."""
    tokenizer = load_tokenizer(ModelSource(path=model))
    module = SFTDataModule(
        train=data, tokenizer=tokenizer, max_length=LENGTH, overlong="truncate", batch_size=CONVERSATIONS
    )
    module.prepare_data()
    module.setup("fit")
    examples = module.datasets["train"]

    def packed(first: int) -> MicroBatch:
        chosen = [examples[i] for i in range(first, first + CONVERSATIONS)]
        return pack(chosen, range(CONVERSATIONS), StepTotals(sum(e.trained_weight for e in chosen), CONVERSATIONS))

    starts = range(0, HELD_OUT + steps * CONVERSATIONS, CONVERSATIONS)
    batches = [packed(first) for first in starts]
    return batches[HELD_OUT // CONVERSATIONS :], batches[: HELD_OUT // CONVERSATIONS]


def summed_loss(network: Any, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy in nats, summed."""
    return token_loss(network, batch, lambda stats, part: -(stats.logps * part.scored.weights).sum())


@torch.no_grad()
def loss_over(network: Any, batches: list[MicroBatch]) -> float:
    """Mean cross-entropy in nats per token."""
    return float(sum(summed_loss(network, b) for b in batches)) / sum(b.totals.tokens for b in batches)


def step(network: Any, optimizer: torch.optim.Optimizer, batch: MicroBatch) -> float:
    """One update; returns the loss before it, in nats per token."""
    loss = summed_loss(network, batch) / batch.totals.tokens
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def merged_both_ways(network: Any, plain: Any, model: str, batches: list[MicroBatch]) -> dict[str, float]:
    """Losses with the adapters folded into what the packed weights stand for, and into the original weights."""
    alone = load_causal_lm(ModelSource(path=model))
    alone.load_state_dict(merged_state(network), strict=False)
    folded = loss_over(alone, batches)
    adapters = {name: value for name, value in network.state_dict().items() if ".lora_" in name}
    plain.load_state_dict(adapters, strict=False)
    return {
        "after, folded into what was trained on": folded,
        "after, on the original weights": loss_over(plain, batches),
    }


if __name__ == "__main__":
    main()
