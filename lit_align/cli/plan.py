"""`plan`: what a configuration will hold, send and take, before anything is loaded.

Networks are built on the meta device: configurations and the tokenizer are read, weights are not.
"""

from __future__ import annotations

import math
import re
import sys
from argparse import ArgumentError, ArgumentParser, ArgumentTypeError
from argparse import Namespace as Options
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lit_align.callbacks.figures import compute_dtype
from lit_align.cli.budget import budget_of
from lit_align.cli.data import accumulated, device_count, is_counted_here
from lit_align.cli.errors import tell
from lit_align.cli.handover import hand_over_tokenizer
from lit_align.cli.plan_text import head_lines, memory_lines, remedy_lines, sent_lines, time_lines, work_lines
from lit_align.cli.plugins import import_classes
from lit_align.cli.situation import Role, Situation, asks_reference, holds_reference, roles_of
from lit_align.cli.training import AlignCLI, ConfigError
from lit_align.cli.workload import Data, seconds, step_flops
from lit_align.machine import Machine, share_of_cores, this_machine, usable_memory
from lit_align.models.flops import update_bytes
from lit_align.models.memory import state_per_weight
from lit_align.models.quantization import refuse_shards
from lit_align.stages import LitDPO
from lit_align.stages.optim import check_takes_shards, takes_shards
from lit_align.stages.precision import check_precision, precision_name
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
    parser.add_argument("--share", type=_share, default=0.5)
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS.get(match[2].lower(), 0)) if match else 0
    if size <= 0:
        raise ArgumentTypeError(f"expected a size such as 80GiB or 24GB, above 0, got {text!r}")
    return size


def _positive(text: str) -> float:
    return _number(text, math.inf, "a number above 0")


def _share(text: str) -> float:
    return _number(text, 1.0, "a share above 0 and at most 1")


def _number(text: str, most: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:  # nor where it is no number
        raise ArgumentTypeError(f"expected {expected}, got {text!r}")
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
    precision = precision_name(trainer.get("precision"))
    check_precision(precision)
    device = _device(trainer.get("accelerator"))
    devices = _ranks_of_a_host(trainer) * (trainer.get("num_nodes") or 1)
    accumulate = accumulated(trainer)
    roles, sharded = roles_of(stage), _is_sharded(trainer.get("strategy"))
    if sharded and (packed := [role.name for role in roles if role.source.quantization]):
        refuse_shards(packed[0])
    sizes = Data(data, stage)
    optimizer = stage.optimizer([torch.nn.Parameter(torch.zeros(1))])
    check_takes_shards(optimizer, sharded)
    options = optimizer.defaults
    spare = device == "cuda" and "foreach" in options and not options.get("fused") and options["foreach"] is not False
    known = {dtype: state_per_weight(stage.optimizer, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Situation(
        stage=stage.name,
        roles=roles,
        device=device,
        devices=devices,
        sharded=sharded,
        mixed="mixed" in precision,
        accumulate=accumulate,
        load=sizes.load,
        most=max(_examples(stage, sizes) // devices, 1),
        state=lambda dtype: known.get(dtype, known[torch.float32]),
        spare=bool(spare),
        takes_shards=takes_shards(optimizer),
        rollout=sizes.rollout(devices),
        lora=roles[0].source.lora is not None,
        own_reference=isinstance(stage, LitDPO) and asks_reference(stage) and not holds_reference(stage),
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
    precision = precision_name(cli.trainer_settings.get("precision"))
    ranks = _ranks_of_a_host(cli.trainer_settings)
    memory = options.memory or _device_memory(situation, ranks)
    machine = _machine(situation, precision, options, ranks)
    moved = sum(_moved(situation, role) for role in situation.trained)
    moved //= situation.devices if situation.sharded else 1
    found = None if machine is None else seconds(situation, cli.stage, data, load, machine, moved)
    lines = [
        *head_lines(situation, precision, _is_guess(cli.trainer_settings, situation)),
        *memory_lines(budget, memory),
        *sent_lines(situation),
        *work_lines(load, step_flops(situation, cli.stage).of(load.work)),
        *time_lines(load, found, machine, options.share),
    ]
    fits = memory is None or budget.peak <= MARGIN * memory
    if not fits:
        lines += remedy_lines(situation, budget.peak, memory, MARGIN)
    print("\n".join(lines))
    return 0 if fits else 1


def _ranks_of_a_host(trainer: Namespace) -> int:
    return device_count(trainer.get("devices"), trainer.get("accelerator"))


def _is_guess(trainer: Namespace, situation: Situation) -> bool:
    """Whether "all GPUs" are counted on a machine that has none."""
    return situation.device == "cuda" and not torch.cuda.is_available() and is_counted_here(trainer.get("devices"))


def _device_memory(situation: Situation, ranks: int) -> int | None:
    if situation.device == "cpu":  # its ranks share the host's
        return usable_memory() // ranks
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _machine(situation: Situation, precision: str, options: Options, ranks: int) -> Machine | None:
    if options.rate and options.bandwidth:
        return Machine(options.rate, options.bandwidth)
    if situation.device == "cuda" and not torch.cuda.is_available():
        return None
    dtype = compute_dtype(precision, situation.trained[0].model.parameters())
    here = this_machine(torch.device(situation.device), dtype)
    share = share_of_cores(ranks) if situation.device == "cpu" else 1.0
    return Machine(options.rate or share * here.flops_per_second, options.bandwidth or share * here.bytes_per_second)


def _moved(situation: Situation, role: Role) -> int:
    trained = [p for p in role.model.parameters() if p.requires_grad]
    return update_bytes(trained, int(sum(p.numel() * situation.state(p.dtype) for p in trained)))
