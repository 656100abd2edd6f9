"""`data check` and `data preview`: what a configuration's data holds, and what the model will see of it.

The configuration is that of `fit`, model and trainer included, but only the data module is built from it: no model is
loaded, no run folder is made.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.cli.errors import tell
from lit_align.cli.handover import hand_over_tokenizer
from lit_align.cli.plugins import import_classes
from lit_align.cli.training import AlignCLI, ConfigError

USAGE = """usage: lit-align data check   --config FILE [--config OVERLAY] [--data.OPTION=VALUE] [--limit N]
       lit-align data preview --config FILE [--config OVERLAY] [--data.OPTION=VALUE]
                              [-n N] [--split SPLIT] [--out FILE.html]

check    reads every record of the configured splits, and says what is wrong and what it costs
           --limit N    faults to tell in full (default 20); all are counted
           exit status  0 = no fault, 1 = faults, 2 = the configuration is not right
preview  shows what the model will see: the first examples of the first epoch, token by token
           -n N         how many examples (default 3)
           --split S    train (default), validation, test or predict
           --out FILE   an HTML page instead of text

The configuration is the one of `lit-align fit`; its model is not loaded, only the tokenizer of it.
"""
SPLITS = ("train", "validation", "test", "predict")


def run(args: Sequence[str]) -> int:
    """Runs `data ACTION`; see `lit_align.__main__.main` for the exit status."""
    action, rest = (args[1] if len(args) > 1 else ""), list(args[2:])
    if action in ("-h", "--help") or "-h" in rest or "--help" in rest:
        print(USAGE)
        return 0
    if action not in ACTIONS:
        print(
            f"lit-align: data {action or '(nothing)'}: expected one of {', '.join(ACTIONS)}\n\n{USAGE}", file=sys.stderr
        )
        return 2
    packages: tuple[str, ...] = ("lit_align",)
    try:
        packages = import_classes()
        options, config = _options(action, rest)
        cli = DataCLI(["fit", *config], packages)
        return ACTIONS[action](cli, options)
    except (ConfigError, ArgumentError) as error:
        print(error if isinstance(error, ConfigError) else f"lit-align: data {action}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        tell(error, packages)
        # An error that knows where a record stands is one of the data; every other is one of the configuration.
        return 1 if hasattr(error, "origin") else 2


class DataCLI(AlignCLI):
    """Parses what `fit` takes, and builds the data module alone."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of `fit`, of which the model may be left out."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def before_instantiate_classes(self) -> None:
        """Gives the data module the model's tokenizer."""
        hand_over_tokenizer(self.command_config)

    def instantiate_classes(self) -> None:
        """Builds the data module."""
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        made = parser.instantiate(jsonargparse.Namespace(data=self.command_config["data"]))
        self.datamodule = made["data"]

    def _set_seed(self) -> None:
        # The order of the data has a seed of its own.
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def share(self) -> dict[str, int]:
        """Ranks and micro-batches that would share a step, as the trainer's settings say."""
        trainer = self.command_config["trainer"]
        ranks = device_count(trainer.get("devices"), trainer.get("accelerator")) * (trainer.get("num_nodes") or 1)
        return {"world_size": ranks, "micro_batches": accumulated(trainer)}


def _check(cli: DataCLI, options: Namespace) -> int:
    report = _method(cli.datamodule, "check")(options.limit, **cli.share())
    _print(str(report))
    return 0 if report.ok else 1


def _preview(cli: DataCLI, options: Namespace) -> int:
    preview = _method(cli.datamodule, "preview")(options.n, options.split, **cli.share())
    if options.out is None:
        _print(preview.text(color=_is_terminal()))
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(preview.html(), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _print(text: str) -> None:
    """Prints what may hold any character, to an output that may not take all of them."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


ACTIONS: dict[str, Callable[[DataCLI, Namespace], int]] = {"check": _check, "preview": _preview}


def _options(action: str, args: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The action's own options, and the arguments that are left: those of the configuration."""
    parser = ArgumentParser(prog=f"lit-align data {action}", add_help=False, allow_abbrev=False, exit_on_error=False)
    if action == "check":
        parser.add_argument("--limit", type=int, default=20)
    else:
        parser.add_argument("-n", type=int, default=3)
        parser.add_argument("--split", choices=SPLITS, default="train")
        parser.add_argument("--out", type=Path, default=None)
    return parser.parse_known_args(args)


def _method(data: LightningDataModule, name: str) -> Callable[..., Any]:
    method = getattr(data, name, None)
    if not callable(method):
        raise ValueError(
            f"{type(data).__name__} has no method {name}, which `data {name}` calls; derive the class from "
            f"AlignDataModule, which has it, or write one"
        )
    return method


def accumulated(trainer: jsonargparse.Namespace) -> int:
    """Micro-batches of a step on each rank, as the trainer's settings say.

    Raises:
        ValueError: There would be none.
    """
    number = trainer.get("accumulate_grad_batches")
    if number is not None and number < 1:
        raise ValueError(f"trainer.accumulate_grad_batches: expected at least 1, got {number}")
    return number or 1


def device_count(devices: Any, accelerator: str | None) -> int:
    """How many devices of this machine Lightning would take; "auto" is counted here and now.

    Raises:
        ValueError: It would take none.
    """
    if is_counted_here(devices):
        return 1 if accelerator == "cpu" else torch.cuda.device_count() or 1
    if isinstance(devices, (list, tuple)):
        number = len(devices)
    else:
        text = str(devices).strip()
        single = int(text) if text.isdigit() else 0
        number = len([part for part in text.split(",") if part.strip()]) if "," in text else single
    if number < 1:
        raise ValueError(f"trainer.devices: expected at least 1, -1 or auto, got {devices}")
    return number


def is_counted_here(devices: Any) -> bool:
    """Whether a setting means all devices of a machine, whatever their number is."""
    return devices is None or str(devices).strip() in ("auto", "-1")
