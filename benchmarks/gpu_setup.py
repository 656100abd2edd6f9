"""Models, sizes and timing of the measurements on one GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
