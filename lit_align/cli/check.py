"""`check`: two optimizer steps of a user's own configuration, split in different ways, compared with the whole.

An update that depends on how its work is split is a wrong one: what the configuration says then changes with the
number of devices, or with what fits in memory.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from lit_align.cli.errors import tell
from lit_align.cli.handover import hand_over_tokenizer
from lit_align.cli.measure import Difference, Measurement, StepRecorder, compare
from lit_align.cli.plugins import import_classes
from lit_align.cli.training import AlignCLI, ConfigError
from lit_align.stages.stage import Stage

USAGE = """usage: lit-align check --config FILE [--config OVERLAY] [--OPTION=VALUE] [--tolerance X]

Makes two optimizer steps of the configuration under different splits (micro-batches, layouts, two processes), and says
how far the losses and the gradients are apart. Dropout is off. Nothing is written.

  --tolerance X   largest relative difference that passes (default: 1e-5, or 0.05 where the precision has 16 bits)
  --processes N   2 (default): one split is made by two processes; 1: none is
  exit status     0 = the splits agree, 1 = they do not, 2 = the configuration is not right
"""
STEPS = 2
OUT = "LIT_ALIGN_CHECK_OUT"
"""Set for the processes of a split over ranks: where rank 0 leaves what it measured."""
KEPT = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm")
"""Trainer settings that belong to the update itself."""


@dataclass(frozen=True)
class Split:
    """A way to split the work: its name, micro-batches per rank, ranks, and settings of the data module."""

    name: str
    accumulate: int = 1
    ranks: int = 1
    data: dict[str, Any] = field(default_factory=dict)


WHOLE = Split("one micro-batch, packed", data={"layout": "packed"})
SPLITS = (
    Split("2 micro-batches", 2, data={"layout": "packed"}),
    Split("8 micro-batches", 8, data={"layout": "packed"}),
    Split("padded on the right", data={"layout": "padded", "padding_side": "right"}),
    Split("padded on the left, 3 micro-batches", 3, data={"layout": "padded", "padding_side": "left"}),
)
RANKS = Split("2 processes, 2 micro-batches each", 2, ranks=2, data={"layout": "packed"})


def run(args: Sequence[str]) -> int:
    """Runs `check`; see `lit_align.__main__.main` for the exit status."""
    packages: tuple[str, ...] = ("lit_align",)
    if "-h" in args or "--help" in args:
        print(USAGE)
        return 0
    try:
        packages = import_classes()
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--tolerance", type=float)
        parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
        options, config = parser.parse_known_args(args[1:])
        # Every split would say once more what the machine has and what became of the data.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        cli = CheckCLI(["fit", *config], packages)
        if out := os.environ.get(OUT):
            _measure_rank(cli, Path(out))
            return 0
        return _check(cli, config if options.processes == 2 else None, options.tolerance)
    except (ConfigError, ArgumentError) as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        tell(error, packages)
        return 2


class CheckCLI(AlignCLI):
    """Parses what `fit` takes; builds stage and data anew for each split."""

    def before_instantiate_classes(self) -> None:
        """Gives the data module the model's tokenizer."""
        hand_over_tokenizer(self.command_config)

    def instantiate_classes(self) -> None:
        """Nothing yet: see `build`."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def build(self, split: Split) -> tuple[Stage, LightningDataModule]:
        """Stage and data module of a split."""
        config = deepcopy(self.config)
        part = config[str(self.subcommand)]
        part["trainer"]["callbacks"], part["trainer"]["logger"] = None, False
        options = part["data"].get("init_args") or Namespace()
        for name, value in split.data.items():
            if name in options:
                options[name] = value
        if "reference_cache" in (model := part["model"].get("init_args") or Namespace()):
            model["reference_cache"] = False  # it is made of all examples, and this is about a few
        seed_everything(self.seed, verbose=False)
        made = self.parser.instantiate(config)[str(self.subcommand)]
        if not isinstance(made["model"], Stage):
            raise ValueError(f"model: expected one of lit_align's stages, got {type(made['model']).__name__}")
        return made["model"], made["data"]

    @property
    def seed(self) -> int:
        """That of the configuration."""
        seed = self.command_config.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0

    def measure(self, split: Split) -> Measurement:
        """Losses and gradients of the first steps."""
        stage, data = self.build(split)
        settings = {name: self.command_config["trainer"].get(name) for name in KEPT}
        recorder = StepRecorder()
        trainer = Trainer(
            **settings,
            devices=split.ranks,
            strategy="ddp" if split.ranks > 1 else "auto",
            accumulate_grad_batches=split.accumulate,
            max_steps=STEPS,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(stage, datamodule=data)
        return recorder.measured


def _check(cli: CheckCLI, config: Sequence[str] | None, tolerance: float | None) -> int:
    precision = str(cli.command_config["trainer"].get("precision") or "32-true")
    tolerance = tolerance if tolerance is not None else 0.05 if "16" in precision else 1e-5
    whole, worst = cli.measure(WHOLE), 0.0
    print(f"{len(whole.losses)} optimizer steps, precision {precision}; the whole: {WHOLE.name}")
    print(f"losses {', '.join(f'{loss:.6f}' for loss in whole.losses)}\n\n{'split':40}{'loss':>12}{'gradient':>12}")
    for name, found in _differences(cli, whole, config):
        worst = max(worst, found.loss, found.gradient)
        print(f"{name:40}{found.loss:12.1e}{found.gradient:12.1e}", flush=True)
    passed = worst <= tolerance
    print(f"\nlargest relative difference {worst:.1e}: {'within' if passed else 'ABOVE'} {tolerance:g}")
    return 0 if passed else 1


def _differences(cli: CheckCLI, whole: Measurement, config: Sequence[str] | None) -> Iterator[tuple[str, Difference]]:
    layouts = "layout" in (cli.command_config["data"].get("init_args") or {})
    for split in SPLITS:
        if layouts or split.data == WHOLE.data:
            yield split.name, compare(whole, cli.measure(split))
    if config is not None and _can_use_two(cli.command_config["trainer"].get("accelerator")):
        yield RANKS.name, compare(whole, _measure_in_processes(config))


def _can_use_two(accelerator: str | None) -> bool:
    """Whether two ranks can have a device each."""
    return accelerator == "cpu" or not torch.cuda.is_available() or torch.cuda.device_count() > 1


def _measure_in_processes(config: Sequence[str]) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS.ranks}"]
        done = subprocess.run(
            [sys.executable, *launch, "-m", "lit_align", "check", *config],
            env=os.environ | {OUT: str(out)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the split over two processes failed:\n{done.stderr[-2000:]}")
        return Measurement(**torch.load(out, weights_only=True))


def _measure_rank(cli: CheckCLI, out: Path) -> None:
    measured = cli.measure(RANKS)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({"losses": measured.losses, "gradients": measured.gradients}, out)
