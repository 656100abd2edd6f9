"""What this machine can do at best: how fast it multiplies matrices and moves memory, measured once and remembered.

And what of the host its processes may use: memory, cores.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

FILE = "machine.json"
SECONDS = 0.1
"""Longest time that one size of a CPU's measurement may take; so a slow data type does not hold a start up."""
CPU_SIZES, CUDA_SIZES = (256, 512, 1024, 2048), (4096, 8192)
REPEATS = 5
CPU_COPY, CUDA_COPY = 2**26, 2**30
"""Bytes of the buffer that is copied: more than caches hold."""


@dataclass(frozen=True)
class Machine:
    """One device at its best.

    Attributes:
        flops_per_second: Floating point operations per second in matrix products of one data type (a multiply-add
            is 2).
        bytes_per_second: Bytes per second, read and written ones added, in a copy of device memory.
    """

    flops_per_second: float
    bytes_per_second: float

    def floor(self, flops: float, num_bytes: float = 0.0) -> float:
        """Seconds below which a step cannot get: its model FLOPs, then its update's bytes, each at full speed."""
        return flops / self.flops_per_second + num_bytes / self.bytes_per_second


def this_machine(device: torch.device, dtype: torch.dtype, folder: str | Path | None = None) -> Machine:
    """What is remembered of this machine, device, data type and number of threads; measured if nothing is.

    Args:
        device: CPU or GPU.
        dtype: In which the run multiplies.
        folder: Where `machine.json` lies; None = $LIT_ALIGN_CACHE, else ~/.cache/lit_align. If it cannot be written,
            the next run measures again.
    """
    root = Path(folder or os.environ.get("LIT_ALIGN_CACHE") or Path.home() / ".cache" / "lit_align").expanduser()
    path, key = root / FILE, _key(device, dtype)
    known = _read(path)
    with suppress(KeyError, TypeError, ValueError):
        machine = Machine(**known[key])
        if machine.flops_per_second > 0 and machine.bytes_per_second > 0:
            return machine
    machine = measure(device, dtype)
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{FILE}.{os.getpid()}")
        part.write_text(json.dumps(_read(path) | {key: asdict(machine)}, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    return machine


def usable_memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the host's memory that this process may take: all of it, or what a container or a job was given.

    Args:
        groups: Control groups of the process.
        mount: Where their settings lie.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_group_limits(groups, mount)])


def _group_limits(groups: Path, mount: Path) -> Iterator[int]:
    """Limits of the process's groups and of those around them; from the root alone where only that can be seen."""
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = mount / controllers  # version 2 has one tree, and no name for it
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        own = root / place.lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # the root of a host has no such file, and "max" is no number
                yield int((folder / name).read_text(encoding="utf-8"))
            if folder == root:
                break


def share_of_cores(ranks: int) -> float:
    """Share of what this process measures of a CPU that each of so many ranks on it has.

    The launcher gives each its part of the threads, unless OMP_NUM_THREADS says how many each has: then they share
    cores where there are fewer of these.
    """
    threads = torch.get_num_threads()
    cores = _cores() if "OMP_NUM_THREADS" in os.environ else threads
    return min(1.0, cores / (ranks * threads))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Times matrix products and copies of random data, the best of several; less than a second on a CPU.

    Random data, because processors are faster on zeros. It comes from a generator of its own: nothing that a run
    draws changes.
    """
    with torch.autocast(device.type, enabled=False):
        machine = Machine(_matrix_rate(device, dtype), _copy_rate(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return machine


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    generator, best = torch.Generator(device).manual_seed(0), 0.0
    for size in CUDA_SIZES if device.type == "cuda" else CPU_SIZES:
        if best and device.type != "cuda" and 2 * size**3 / best > SECONDS:
            break
        one, other = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / _best_seconds(lambda a=one, b=other: a @ b, device))
    return best


def _copy_rate(device: torch.device) -> float:
    size = CUDA_COPY if device.type == "cuda" else CPU_COPY
    source = torch.rand(size // 4, generator=torch.Generator(device).manual_seed(0), device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # what is only done the first time
    started, best, timed = time.perf_counter(), float("inf"), _timed_on_gpu if device.type == "cuda" else _timed
    for _ in range(REPEATS):
        best = min(best, timed(work))
        if device.type != "cuda" and time.perf_counter() - started > SECONDS:
            break
    return best


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _timed_on_gpu(work: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def _key(device: torch.device, dtype: torch.dtype) -> str:
    """All that the figures depend on."""
    parts = [platform.node(), f"torch {torch.__version__}", str(dtype).removeprefix("torch.")]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    else:
        parts += [device.type, platform.machine(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if dtype == torch.float32:
        parts.append(f"{torch.get_float32_matmul_precision()} precision")
    return ", ".join(parts)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
