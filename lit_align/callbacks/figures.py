"""From what was counted between two moments of a run to the figures that people read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from lit_align.batch import Work
from lit_align.machine import Machine
from lit_align.models.flops import Flops

GIB = 2**30
PHASE, COUNT = "phase:", "count:"
"""What the names of a stage's own phases and counts begin with among the counters."""
ROLLOUT, COUNTS = "rollout", ("answers", "sampled_tokens")
"""The phase in which answers are sampled, and what is counted in it."""
SHARES = {"share_padding": "padding", "share_prefix_saved": "saved by shared prefixes", "share_data_wait": "data wait"}
MEMORY = {"memory_allocated_gib": "GPU", "memory_reserved_gib": "GPU reserved", "memory_rss_gib": "host"}
"""Words for people."""


def figures(
    counted: Mapping[str, float], cost: Flops | None, machine: Machine | None, update_bytes: float, ranks: int
) -> dict[str, float]:
    """The figures of a stretch of training; their denominators stand in docs/performance.md.

    Args:
        counted: `seconds`, `waited`, `steps`, the fields of `Work` and the stage's counts over all ranks, and its
            phases.
        cost: Of a unit of work in a training step; None = not known.
        machine: One rank's device at its best; None = not known.
        update_bytes: Bytes that an optimizer step moves on each rank.
        ranks: How many share the work.

    Returns:
        By name, without `perf/`; what cannot be told is left out.
    """
    seconds, phases = counted["seconds"], _named(counted, PHASE)
    if seconds <= 0:
        return {}
    rolled = min(sum(phases.values()), seconds)
    found = {f"phase/{name}": spent / seconds for name, spent in phases.items()}
    if phases:
        found["phase/update"] = 1 - rolled / seconds
    if phases.get(ROLLOUT):
        found |= {f"rollout/{name}_per_second": n / phases[ROLLOUT] for name, n in _named(counted, COUNT).items()}
    # Rollouts happen while the trainer waits for the loader.
    found["share_data_wait"] = max(counted["waited"] - rolled, 0.0) / seconds
    work = Work(*(counted[name] for name in Work._fields))  # type: ignore[arg-type]
    if work.tokens and seconds > rolled:
        found |= _of_update(work, seconds - rolled)
        if cost is not None:
            found["model_flops_per_second"] = cost.of(work) / (seconds - rolled)
        if cost is not None and machine is not None:
            floor = machine.floor(cost.of(work) / ranks, update_bytes * counted["steps"])
            found["share_of_floor"] = floor / (seconds - rolled)
    return found


def of_whole_run(found: Mapping[str, float]) -> dict[str, float]:
    """Without the shares of phases where no rollout was seen: of a short run, the only one was warm-up."""
    unseen = found.get(f"phase/{ROLLOUT}") == 0
    return {name: value for name, value in found.items() if not (unseen and name.startswith("phase/"))}


def _of_update(work: Work, seconds: float) -> dict[str, float]:
    return {
        "tokens_per_second": work.tokens / seconds,
        "examples_per_second": work.examples / seconds,
        "share_padding": work.padding / work.computed,
        "share_prefix_saved": (work.unshared - (work.computed - work.padding)) / work.unshared,
    }


def _named(counted: Mapping[str, float], start: str) -> dict[str, float]:
    return {name.removeprefix(start): value for name, value in counted.items() if name.startswith(start)}


def over_all_ranks(counted: dict[str, float], device: torch.device) -> dict[str, float]:
    """The same with all ranks' work and counts added up, by one collective; seconds are this rank's own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return counted
    # MPS, which has no float64, has no process groups either.
    names = [name for name in counted if name in Work._fields or name.startswith(COUNT)]
    sums = torch.tensor([counted[name] for name in names], dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return counted | dict(zip(names, sums.tolist(), strict=True))


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Largest amounts of a GPU's memory so far, in GiB, as the host knows them; nothing for other devices."""
    if device.type != "cuda":
        return {}
    return {
        "memory_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def host_memory() -> dict[str, float]:
    """Largest amount of the host's memory that this process held so far, in GiB; nothing where that is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_rss_gib": peak * (1 if sys.platform == "darwin" else 1024) / GIB}


def in_words(found: Mapping[str, float], machine: Machine | None, dtype: torch.dtype) -> str:
    """One line for people."""
    parts = []
    if "tokens_per_second" in found:
        parts.append(f"{short(found['tokens_per_second'])} tokens/s, {short(found['examples_per_second'])} examples/s")
    if "model_flops_per_second" in found:
        parts.append(f"{short(found['model_flops_per_second'], ' ')}FLOP/s" + _beside_floor(found, machine, dtype))
    if "rollout/sampled_tokens_per_second" in found:
        parts.append(f"{short(found['rollout/sampled_tokens_per_second'])} sampled tokens/s")
    parts += [f"{word} {found[name]:.1%}" for name, word in SHARES.items() if name in found]
    parts += [f"{name.removeprefix('phase/')} {part:.0%}" for name, part in found.items() if name.startswith("phase/")]
    parts += [f"{word} memory {found[name]:.2f} GiB" for name, word in MEMORY.items() if name in found]
    return ", ".join(parts)


def _beside_floor(found: Mapping[str, float], machine: Machine | None, dtype: torch.dtype) -> str:
    if machine is None or "share_of_floor" not in found:
        return ""
    rate, copied = short(machine.flops_per_second, " "), short(machine.bytes_per_second, " ")
    at_best = f"{rate}FLOP/s in {str(dtype).removeprefix('torch.')}, {copied}B/s"
    return f" = {found['share_of_floor']:.2f} of the machine's floor ({at_best})"


def short(number: float, space: str = "") -> str:
    """Three digits and a thousand's letter: 12.3k; `space` goes between, before a unit."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{space}{letter}"
    return f"{number:.3g}{space}"


def compute_dtype(precision: str, parameters: Any) -> torch.dtype:
    """In which a run multiplies: autocast's type, else that of most of its weights."""
    if precision.endswith("mixed"):
        return torch.bfloat16 if precision.startswith("bf16") else torch.float16
    sizes: dict[torch.dtype, int] = {}
    for parameter in parameters:
        if parameter.is_floating_point():  # weights of 4 bits lie in integers; what they become is what the rest is
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
