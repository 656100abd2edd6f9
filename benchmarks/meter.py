"""The clock and the scales that both sides carry: one file, so that both are measured the same way."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate", "datasets", "peft", "numpy")


class Meter:
    """Seconds, CPU seconds, memory, losses and tokens of each optimizer step of one process.

    Args:
        device: Whose memory is looked at: the process' own (RSS) for "cpu", the allocator's for "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.stamps: list[tuple[float, float]] = []
        self.losses: list[Any] = []
        self.steps: list[dict[str, Any]] = []
        self.grad_norm: float | None = None
        self.baseline = 0
        self.extra_seconds = 0.0
        self.start_cost: dict[str, float] = {}

    def loaded(self, *models: torch.nn.Module) -> None:
        """All weights are in memory: from here on memory counts. Weights that are still on disk are read in."""
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                float(tensor.detach().float().sum())
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.baseline = torch.cuda.memory_allocated()
            return
        reset_high_water()
        self.baseline = memory("VmRSS")

    def stamp(self) -> None:
        """A step begins or has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.stamps.append((time.perf_counter(), time.process_time()))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; the first stamp is the beginning of the first step."""
        pairs = list(zip(self.stamps, self.stamps[1:], strict=False))
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else memory("VmHWM")
        return {
            "seconds": [after[0] - before[0] for before, after in pairs],
            "cpu_seconds": [after[1] - before[1] for before, after in pairs],
            "losses": [float(loss) for loss in self.losses],
            "grad_norm": self.grad_norm,
            "steps": self.steps,
            "baseline_bytes": self.baseline,
            "peak_bytes_above_weights": peak - self.baseline,
            "extra_seconds": self.extra_seconds,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def save(self, path: Path, **more: Any) -> None:
        """Writes all of it as JSON."""
        path.write_text(json.dumps(self.as_dict() | more), encoding="utf-8")


def memory(field: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (most since `reset_high_water`)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def reset_high_water() -> None:
    """Makes VmHWM start again from what the process holds now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def digest(examples: Iterable[Sequence[Sequence[int]]]) -> str:
    """Of a step's examples, whatever their order: each is the list of its sequences and the numbers trained of each."""
    return hashlib.sha256(json.dumps(sorted([list(map(list, e)) for e in examples])).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python and of what is installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, cores, memory; the GPU if there is one."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        names = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
    found = {"cpu": ", ".join(sorted(names)) or platform.processor(), "cores": os.cpu_count(), "system": sys.platform}
    with open("/proc/meminfo", encoding="ascii") as file:
        found["memory_gb"] = round(int(file.readline().split()[1]) / 2**20, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def matrix_rate(size: int = 4096, repeats: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the best of some square matrix products of random numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
