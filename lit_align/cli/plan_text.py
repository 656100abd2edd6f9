"""A plan in words."""

from __future__ import annotations

from collections.abc import Iterator

from lit_align.cli.budget import Budget, budget_of, sent_bytes
from lit_align.cli.remedies import remedies
from lit_align.cli.situation import Role, Situation
from lit_align.cli.workload import Seconds, Workload
from lit_align.machine import Machine
from lit_align.models.quantization import packed_names, weight_count

KINDS = {"cpu": "CPU", "cuda": "GPU"}
SIZES = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
TIMES = {"days": 86400, "h": 3600, "min": 60}
NO_MACHINE = "not known: the run's device is not in this machine; give --rate and --bandwidth"


def head_lines(situation: Situation, precision: str, guess: bool = False) -> Iterator[str]:
    """Devices, networks, the largest micro-batch; `guess` = the number of devices could not be counted."""
    yield f"plan: {situation.stage} on {situation.devices} x {KINDS[situation.device]} ({_way(situation)}), {precision}"
    if guess:
        yield "  trainer.devices: auto was counted as 1 a host, for there is no GPU here; give the number of the run's"
    for role in situation.roles:
        yield f"  {role.name:<13} {_network(role)}"
    load = situation.largest()
    yield f"  largest micro-batch of a device: {load.tokens:,} positions, {load.scored:,} scored tokens"


def _way(situation: Situation) -> str:
    if situation.devices == 1:
        return "alone"
    return "fsdp2: all networks in shards" if situation.sharded else "ddp: a copy each"


def _network(role: Role) -> str:
    model, packed = role.model, packed_names(role.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters() if name not in packed})
    dtypes += [str(role.source.quantization)] if packed else []
    some = f"{_count(sum(p.numel() for p in trained))} of them trained" if trained else "frozen"
    where = ", on the policy's trunk" * role.on_trunk
    return f"{_count(weight_count(model))} parameters ({', '.join(dtypes)}), {some}{where}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def memory_lines(budget: Budget, memory: int | None) -> Iterator[str]:
    """What a device holds, and when it holds most."""
    yield "\nmemory of each device"
    for name, size in budget.held.items():
        yield _row(name, size)
    for phase, parts in budget.phases.items():
        if parts:
            yield _row(f"+ {phase}{' (the peak)' * (phase == budget.peak_phase)}", sum(parts.values()))
            yield from (_row(f"    {name}", size) for name, size in parts.items())
    share = "; how much the device has is not known: give --memory"
    if memory is not None:
        share = f": {budget.peak / memory:.0%} of the device's {size_text(memory)}"
    yield f"  peak {size_text(budget.peak)}{share}"


def sent_lines(situation: Situation) -> Iterator[str]:
    """What each device sends."""
    for name, size in sent_bytes(situation).items():
        yield _row(f"sent for a step: {name}", size)


def work_lines(load: Workload, flops: float) -> Iterator[str]:
    """Steps, tokens, model FLOPs; `flops` are those of a step."""
    work = load.work
    yield f"\nwork ({load.note})"
    yield f"  a step   {work.examples:,.1f} examples, {work.tokens:,.0f} tokens, {flops:.3g} model FLOPs on all devices"
    epoch = "" if load.per_epoch is None else f"; an epoch has {load.per_epoch:,} steps"
    whole = "steps not known: give trainer.max_steps, or data that can be counted"
    if load.steps is not None:
        tokens = load.steps * work.tokens
        whole = f"{load.steps:,} steps, {tokens:,.0f} tokens, {load.steps * flops:.3g} model FLOPs"
    yield f"  the run  {whole}{epoch}"


def time_lines(load: Workload, found: Seconds | None, machine: Machine | None, share: float) -> Iterator[str]:
    """Seconds at the machine's full rate, and at a share of it."""
    if found is None or machine is None:
        yield f"\ntime: {NO_MACHINE}"
        return
    rates = f"{machine.flops_per_second / 1e9:,.0f} GFLOP/s, {machine.bytes_per_second / 1e9:,.1f} GB/s"
    yield f"\ntime (a device at best: {rates}; sending, loading and validation are not in it)"
    rows = {"a step": found.step, "a rollout": found.rollout}
    if load.steps is not None:
        rollouts = load.steps / load.per_epoch if load.per_epoch else 0
        rows["the run"] = load.steps * found.step + rollouts * found.rollout
    for name, floor in rows.items():
        if floor:
            yield f"  {name:<10} at least {time_text(floor)}; {time_text(floor / share)} at a share of {share:g}"


def remedy_lines(situation: Situation, peak: int, memory: int, margin: float) -> Iterator[str]:
    """What would need less memory, alone and on top of each other."""
    yield f"\nWARNING: it will not fit: {size_text(peak)} are more than {margin:.0%} of {size_text(memory)}."
    yield f"  {'what needs less':<60}{'peak alone':>16}{'and those above':>20}"
    for remedy in remedies(situation, memory * margin):
        alone, together = (_mark(budget_of(s).peak, memory * margin) for s in (remedy.alone, remedy.together))
        yield f"  {remedy.option:<60}{alone:>16}{together:>20}"


def _mark(peak: int, most: float) -> str:
    return f"{size_text(peak)}{' fits' if peak <= most else ''}"


def _row(name: str, size: int) -> str:
    return f"  {name:<60}{size_text(size):>12}"


def size_text(size: float) -> str:
    """Bytes in words."""
    unit = next((unit for unit, least in SIZES.items() if size >= least), "KiB")
    value = size / SIZES[unit]
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def time_text(seconds: float) -> str:
    """Seconds in words."""
    for unit, size in TIMES.items():
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
