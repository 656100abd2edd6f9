"""`plan`: what a configuration will hold, send and take, before anything is loaded.

Networks are built on the meta device: configurations and the tokenizer are read, weights are not.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError, ArgumentParser, ArgumentTypeError
from argparse import Namespace as Options
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lit_align.callbacks.figures import compute_dtype
from lit_align.cli.budget import Budget, budget_of, remedies, sent_bytes
from lit_align.cli.data import device_count
from lit_align.cli.errors import tell
from lit_align.cli.handover import hand_over_tokenizer
from lit_align.cli.plugins import import_classes
from lit_align.cli.situation import Situation, roles_of
from lit_align.cli.training import AlignCLI, ConfigError
from lit_align.cli.workload import Data, Workload, seconds, step_flops
from lit_align.machine import Machine, this_machine
from lit_align.models.flops import update_bytes
from lit_align.models.memory import state_per_weight
from lit_align.stages.stage import Stage

USAGE = """usage: lit-align plan --config FILE [--config OVERLAY] [--OPTION=VALUE]
                      [--memory 80GiB] [--rate 4e14] [--bandwidth 2e12] [--share 0.5]

Says what each device will hold, send and compute, and how long that takes, before anything is loaded: only the
configurations of the networks are read. Training data is tokenised only if it is small, or tokenised already.

  --memory SIZE     of one device (GiB, GB, MiB ...); default: that of this machine
  --rate X          FLOP/s of one device in matrix products; default: measured, if the run's device is in this machine
  --bandwidth X     bytes/s of a copy in one device's memory, read and written ones added; default: the same
  --share X         share of these rates that the estimated time is for (default 0.5)
  exit status       0 = it fits, 1 = it does not, 2 = the configuration is not right
"""
MARGIN = 0.92
"""Share of a device's memory that may be planned with: the rest is for what libraries hold and for fragments."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
UNKNOWN = "not known: the run's device is not in this machine; give --rate and --bandwidth"


def run(args: Sequence[str]) -> int:
    """Runs `plan`; see `lit_align.__main__.main` for the exit status."""
    packages: tuple[str, ...] = ("lit_align",)
    if "-h" in args or "--help" in args:
        print(USAGE)
        return 0
    try:
        packages = import_classes()
        options, config = _parser().parse_known_args(args[1:])
        cli = PlanCLI(["fit", *config], packages)
        return _plan(cli, options)
    except (ConfigError, ArgumentError) as error:
        print(error if isinstance(error, ConfigError) else f"lit-align: plan: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        tell(error, packages)
        return 2


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lit-align plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--memory", type=_bytes)
    parser.add_argument("--rate", type=_positive)
    parser.add_argument("--bandwidth", type=_positive)
    parser.add_argument("--share", type=_positive, default=0.5)
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if not match or match[2].lower() not in UNITS:
        raise ArgumentTypeError(f"expected a size such as 80GiB or 24GB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


class PlanCLI(AlignCLI):
    """Parses what `fit` takes; builds stage and data module, which load nothing by that."""

    def before_instantiate_classes(self) -> None:
        """Gives the data module the model's tokenizer."""
        hand_over_tokenizer(self.command_config)

    def instantiate_classes(self) -> None:
        """Builds stage and data module without callbacks and loggers, which may begin something."""
        config = deepcopy(self.config)
        part = config[str(self.subcommand)]
        part["trainer"]["callbacks"], part["trainer"]["logger"], part["trainer"]["plugins"] = None, False, None
        part["trainer"]["strategy"] = "auto"
        made = self.parser.instantiate(config)[str(self.subcommand)]
        self.stage, self.data = made["model"], made["data"]

    def _set_seed(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def trainer_settings(self) -> Namespace:
        """The trainer's part of the configuration."""
        return self.command_config["trainer"]


def situation_of(stage: Any, data: LightningDataModule, trainer: Namespace) -> tuple[Situation, Data]:
    """What the parts of a configuration come to.

    Args:
        stage: As built from the configuration, nothing loaded.
        data: The same.
        trainer: Settings of the trainer.

    Raises:
        ValueError: A stage or a strategy that cannot be planned.
    """
    precision = str(trainer.get("precision") or "32-true")
    mixed, half = "mixed" in precision, precision in ("bf16-true", "16-true")
    device = _device(trainer.get("accelerator"))
    devices = device_count(trainer.get("devices"), trainer.get("accelerator")) * (trainer.get("num_nodes") or 1)
    accumulate = trainer.get("accumulate_grad_batches") or 1
    roles = roles_of(stage, half)
    sizes = Data(data, stage)
    optimizer = stage.optimizer([torch.nn.Parameter(torch.zeros(1))])
    options = optimizer.defaults
    spare = device == "cuda" and "foreach" in options and not options.get("fused") and options["foreach"] is not False
    known = {dtype: state_per_weight(stage.optimizer, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Situation(
        stage=stage.name,
        roles=roles,
        device=device,
        devices=devices,
        sharded=_is_sharded(trainer.get("strategy")),
        mixed=mixed,
        accumulate=accumulate,
        load=sizes.load,
        most=max(_examples(stage, sizes) // devices, 1),
        state=lambda dtype: known.get(dtype, known[torch.float32]),
        spare=bool(spare),
        rollout=sizes.rollout(devices),
        lora=roles[0].source.lora is not None,
    ), sizes


def _examples(stage: Stage, sizes: Data) -> int:
    return sizes.batch // stage.ppo.num_minibatches if stage.name == "ppo" else sizes.batch


def _device(accelerator: Any) -> str:
    if accelerator == "cpu":
        return "cpu"
    if accelerator in ("gpu", "cuda"):
        return "cuda"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_sharded(strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None) or "auto"
    name = name.rsplit(".", 1)[-1].lower()
    if name.startswith("fsdp2"):
        return True
    if name.startswith(("auto", "single", "ddp")):
        return False
    raise ValueError(f"trainer.strategy: `plan` knows auto, ddp and fsdp2, got {strategy!r}")


def _plan(cli: PlanCLI, options: Options) -> int:
    situation, data = situation_of(cli.stage, cli.data, cli.trainer_settings)
    budget, load = budget_of(situation), data.workload(cli.trainer_settings)
    precision = cli.trainer_settings.get("precision") or "32-true"
    memory = options.memory or _device_memory(situation)
    lines = [*_head_lines(situation, str(precision)), *_memory_lines(budget, memory)]
    lines += [*_sent_lines(situation), *_work_lines(situation, cli.stage, load)]
    lines += _time_lines(situation, cli.stage, data, load, str(precision), options)
    fits = memory is None or budget.peak <= MARGIN * memory
    print("\n".join(lines if fits else [*lines, *_remedy_lines(situation, budget, memory)]))
    return 0 if fits else 1


def _device_memory(situation: Situation) -> int | None:
    if situation.device == "cpu":  # its ranks share the host's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // situation.devices
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _head_lines(situation: Situation, precision: str) -> Iterator[str]:
    way = (
        "alone"
        if situation.devices == 1
        else "fsdp2, everything in shards"
        if situation.sharded
        else "ddp, a copy each"
    )
    kind = {"cpu": "CPU", "cuda": "GPU"}[situation.device]
    yield f"plan: {situation.stage} on {situation.devices} x {kind} ({way}), precision {precision}"
    for role in situation.roles:
        weights, dtype = role.weights, str(next(role.model.parameters()).dtype).removeprefix("torch.")
        whole = sum(p.numel() for p in role.model.parameters())
        yield f"  {role.name:<13} {whole / 1e6:,.1f}M parameters in {dtype}, {weights.trained / 1e6:,.1f}M trained"
    load = situation.largest()
    yield f"  largest micro-batch: {load.tokens:,} positions, {load.scored:,} scored tokens"


def _memory_lines(budget: Budget, memory: int | None) -> Iterator[str]:
    yield "\nmemory of each device"
    for name, size in budget.held.items():
        yield _row(name, size)
    for phase, parts in budget.phases.items():
        peak = phase == budget.peak_phase
        yield f"  + {phase}{' (most is held here)' if peak else ''}: {size_text(sum(parts.values()))}"
        yield from (_row(f"  {name}", size) for name, size in parts.items())
    share = "; of the device's nothing is known: give --memory" if memory is None else _share(budget.peak, memory)
    yield f"  peak {size_text(budget.peak)}{share}"


def _share(peak: int, memory: int) -> str:
    return f", {peak / memory:.0%} of {size_text(memory)}"


def _sent_lines(situation: Situation) -> Iterator[str]:
    for name, size in sent_bytes(situation).items():
        yield f"  each device sends a step: {size_text(size)} ({name})"


def _work_lines(situation: Situation, stage: Stage, load: Workload) -> Iterator[str]:
    flops, work = step_flops(situation, stage).of(load.work), load.work
    yield f"\nwork ({load.note})"
    yield f"  a step: {work.examples:,.1f} examples, {work.tokens:,.0f} tokens, {flops:.3g} model FLOPs, all devices"
    epoch = "" if load.per_epoch is None else f"{load.per_epoch:,} steps an epoch"
    if load.steps is None:
        yield f"  the run: steps not known{f'; {epoch}' if epoch else ''}; give trainer.max_steps"
        return
    whole = f"{load.steps:,} steps, {load.steps * work.tokens:.3g} tokens, {load.steps * flops:.3g} model FLOPs"
    yield f"  the run: {whole}{f'; {epoch}' if epoch else ''}"


def _time_lines(
    situation: Situation, stage: Stage, data: Data, load: Workload, precision: str, options: Options
) -> Iterator[str]:
    machine = _machine(situation, precision, options)
    if machine is None:
        yield f"\ntime: {UNKNOWN}"
        return
    rates = f"{machine.flops_per_second / 1e9:,.0f} GFLOP/s, {machine.bytes_per_second / 1e9:,.1f} GB/s a device"
    yield f"\ntime ({rates}; what devices send is not in it)"
    moved = sum(_moved(situation, role) for role in situation.trained)
    found = seconds(situation, stage, data, load, machine, moved // (situation.devices if situation.sharded else 1))
    rows = {"a step": found.step, "a rollout": found.rollout}
    if load.steps is not None:
        rollouts = load.steps / load.per_epoch if found.rollout and load.per_epoch else 0
        rows["the run"] = load.steps * found.step + rollouts * found.rollout
    for name, floor in rows.items():
        if floor:
            yield f"  {name}: at least {time_text(floor)}; {time_text(floor / options.share)} at {options.share:g} of it"


def _moved(situation: Situation, role: Any) -> int:
    trained = [p for p in role.model.parameters() if p.requires_grad]
    return update_bytes(trained, int(sum(p.numel() * situation.state(p.dtype) for p in trained)))


def _machine(situation: Situation, precision: str, options: Options) -> Machine | None:
    if options.rate and options.bandwidth:
        return Machine(options.rate, options.bandwidth)
    if situation.device == "cuda" and not torch.cuda.is_available():
        return None
    dtype = compute_dtype(precision, situation.trained[0].model.parameters())
    here = this_machine(torch.device(situation.device), dtype)
    return Machine(options.rate or here.flops_per_second, options.bandwidth or here.bytes_per_second)


def _remedy_lines(situation: Situation, budget: Budget, memory: int) -> Iterator[str]:
    yield f"\nWARNING: {size_text(budget.peak)} do not fit in {MARGIN:.0%} of {size_text(memory)}. What needs less:"
    yield f"  {'':<58}{'alone':>12}{'with those above':>20}"
    for remedy in remedies(situation):
        alone, together = budget_of(remedy.alone).peak, budget_of(remedy.together).peak
        marks = [f"{size_text(p)}{' fits' if p <= MARGIN * memory else ''}" for p in (alone, together)]
        yield f"  {remedy.option:<58}{marks[0]:>12}{marks[1]:>20}"


def _row(name: str, size: int) -> str:
    return f"  {name:<52}{size_text(size):>12}"


def size_text(size: float) -> str:
    """Bytes in words."""
    unit = next((u for u in ("TiB", "GiB", "MiB") if size >= UNITS[u[:-1].lower()]), "KiB")
    return f"{size / UNITS[unit[:-1].lower()]:,.4g} {unit}"


def time_text(seconds: float) -> str:
    """Seconds in words."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size * (2 if unit != "s" else 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"
