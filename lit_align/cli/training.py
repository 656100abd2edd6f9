"""fit, validate, test and predict: LightningCLI with run folders, short class names and messages for people."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_align import runs
from lit_align.background_io import BackgroundCheckpointIO
from lit_align.callbacks import (
    Checkpoints,
    ExportHF,
    Meter,
    OneRun,
    PredictionRows,
    Preemption,
    RandomState,
    SaveRun,
)
from lit_align.checkpoint_io import WholeCheckpointIO
from lit_align.cli.errors import explain, message_for_user, tell
from lit_align.cli.handover import hand_over_tokenizer
from lit_align.cli.keys import class_at
from lit_align.cli.plugins import import_classes
from lit_align.cli.resume import FinishedError, check_checkpoint, check_new, find
from lit_align.strategies import refuse_fsdp1  # and registers fsdp2

TRAINER_DEFAULTS = {
    # The data modules plan which rank works on what; Lightning's sampler would shuffle and shard once more.
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
}


def run(args: Sequence[str]) -> int:
    """Runs a training command; see `lit_align.__main__.main` for the exit status."""
    packages: tuple[str, ...] = ("lit_align",)
    try:
        packages = import_classes()
        AlignCLI(list(args), packages)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except FinishedError as finished:
        print(finished)
        return 0
    except SIGTERMException:
        return 143  # Lightning's own exception ends with 0, and a run that was stopped would look finished
    except Exception as error:
        tell(error, packages)
        # What the trainer finds wrong with its own settings is configuration too, however late it finds it.
        return 2 if isinstance(error, (MisconfigurationException, _Unbuilt)) else 1
    return 0


class _Unbuilt(ValueError):
    """The configuration parses, and what it describes cannot be built."""


@contextmanager
def _building(packages: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        message = message_for_user(error, packages)
        if message is None:
            raise
        raise _Unbuilt(message) from error


class ConfigError(Exception):
    """A configuration that cannot be; its text is for the user."""


class AlignCLI(LightningCLI):
    """LightningCLI for one stage and its data.

    Args:
        args: Command and options.
        packages: Packages whose classes may be named without their module.
    """

    def __init__(self, args: Sequence[str], packages: Sequence[str] = ("lit_align",)) -> None:
        # A sweep's null arrives as Python writes it.
        self.arguments = [arg[: -len("None")] + "null" if arg.endswith("=None") else arg for arg in args]
        self.packages = tuple(packages)
        self.run_dir: Path | None = None
        self._fresh = False
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveRun,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=self.arguments,
        )

    # -- parsing

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises instead of printing a hundred lines of usage, and takes whole names alone."""
        own = {"exit_on_error": False, "allow_abbrev": False}
        return super().init_parser(**{"prog": "lit-align", "dump_header": None, **kwargs, **own})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run folder."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: configuration, checkpoints, metrics, export. "
            "Default: runs/<stage>/<time>; with --ckpt_path last or --resume true, the newest run of the stage.",
        )
        parser.add_argument(
            "--resume",
            type=bool,
            default=False,
            help="Go on from the newest whole checkpoint of the run folder, if there is one; else begin. "
            "So the same command starts a run and takes it up again after it was killed.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int | None,
            default=None,
            help="Optimizer steps between checkpoints inside an epoch; default: only at the end of epochs.",
        )
        parser.add_argument(
            "--checkpoint_async",
            type=bool,
            default=False,
            help="Write checkpoints while training goes on, from a copy in the CPU's memory; not under fsdp2.",
        )
        parser.add_argument(
            "--meter",
            type=bool,
            default=True,
            help="Measure how fast the run is, and how far from what the machine could do; see docs/performance.md.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and says in a few lines what is wrong."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            subparser = self._subcommand_parsers.get(args[0], parser)
            options = subparser.get_defaults(skip_validation=True).keys()
            raise ConfigError(explain(error, args, options, self.packages).text(args)) from error

    def _parse_ckpt_path(self) -> None:
        # Lightning lets the hyperparameters in a checkpoint override the configuration and the command line.
        pass

    # -- the run folder

    @property
    def command_config(self) -> Namespace:
        """The command's part of the configuration."""
        return self.config[str(self.subcommand)]

    def before_instantiate_classes(self) -> None:
        """Settles what depends on several parts of the configuration: tokenizer, run folder, checkpoint."""
        config = self.command_config
        hand_over_tokenizer(config)
        with _building(self.packages):
            refuse_fsdp1(config["trainer"].get("strategy"))
            self.run_dir = self._settle_run_dir(config)
        _point_wandb_at(config["trainer"].get("logger"), self.run_dir)

    def _settle_run_dir(self, config: Namespace) -> Path:
        root = config["trainer"].get("default_root_dir") or runs.RUNS
        stage, given = _stage_name(config["model"]["class_path"]), config.get("run_dir")
        if config.get("ckpt_path") == "last":
            given = given or runs.latest_run(root, stage)
            config["ckpt_path"] = str(runs.last_checkpoint(Path(given)))
        check_checkpoint(config.get("ckpt_path"))
        if self.subcommand == "fit" and config.get("ckpt_path") is None:
            given = given or runs.job_run(root, stage)
            if config.get("resume"):
                if found := find(given, root, stage, config["trainer"]):
                    given, config["ckpt_path"] = found
            elif given is not None and not config["trainer"].get("fast_dev_run"):
                check_new(given)
        if given is not None:
            return runs.given_run_dir(given)
        self._fresh = True
        # Only training runs go where the next stage looks for its start.
        return runs.choose_run_dir(root, stage if self.subcommand == "fit" else f"{stage}-{self.subcommand}")

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; a run that fails here leaves no empty folder."""
        assert self.run_dir is not None
        try:
            with _building(self.packages):
                super().instantiate_classes()
        except BaseException:
            self._leave_nothing()
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            self._leave_nothing()
            raise

    def _leave_nothing(self) -> None:
        """Removes the new run's folder if nothing was written to it."""
        if self._fresh and self.run_dir is not None:
            with suppress(OSError):  # something is in it already, or another rank was faster
                self.run_dir.rmdir()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with what every run has: a folder, a CSV log, checkpoints, exact resume, an export."""
        assert self.run_dir is not None
        config = self.config_init[str(self.subcommand)]["trainer"]
        loggers = self._loggers(config.get("logger"), self.run_dir)
        callbacks = _as_list(config.get("callbacks"))
        callbacks += self._default_callbacks(callbacks, config, bool(loggers), self.run_dir)
        plugins = _as_list(config.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            in_background = self.command_config.get("checkpoint_async")
            plugins.append(BackgroundCheckpointIO() if in_background else WholeCheckpointIO())
        with _building((*self.packages, "lightning")):
            return super().instantiate_trainer(
                default_root_dir=str(self.run_dir),
                logger=loggers or False,
                callbacks=callbacks,
                plugins=plugins,
                **kwargs,
            )

    def _loggers(self, given: Any, run_dir: Path) -> list[Logger]:
        if given is False or (given is None and self.subcommand != "fit"):
            return []
        loggers = [] if given in (None, True) else _as_list(given)
        if self.subcommand == "fit" and not any(isinstance(logger, CSVLogger) for logger in loggers):
            runs.set_aside(run_dir / "metrics.csv")
            loggers.append(CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=10))
        return loggers

    def _default_callbacks(self, given: list[Callback], config: Namespace, logs: bool, run_dir: Path) -> list[Callback]:
        if self.subcommand != "fit":
            return [PredictionRows()] if self.subcommand == "predict" else []
        if config.get("fast_dev_run"):
            return []
        folder = run_dir / runs.CHECKPOINTS
        saves = config.get("enable_checkpointing") is not False
        defaults: list[Callback] = [OneRun(run_dir, self.command_config.get("ckpt_path")), RandomState(), ExportHF()]
        defaults.append(Preemption(str(folder) if saves else None))
        if self.command_config.get("meter"):
            defaults.append(Meter())
        if logs:
            defaults.append(LearningRateMonitor(logging_interval="step"))
        if saves:  # beside a user's own: exact resume needs the newest, whatever else is kept
            defaults.append(Checkpoints(str(folder), self.command_config.get("checkpoint_every")))
        for callback in given:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder)
        return [callback for callback in defaults if not any(type(c) is type(callback) for c in given)]


def _stage_name(class_path: str) -> str:
    """The stage's own name (pt, sft, rm, dpo, ppo); a module without one goes by its class."""
    name = getattr(class_at(class_path), "name", None)
    return name if isinstance(name, str) else class_path.rsplit(".", 1)[-1].removeprefix("Lit").lower()


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _point_wandb_at(loggers: Any, run_dir: Path) -> None:
    """Lets W&B write into the run folder, unless the user said where."""
    for logger in _as_list(loggers):
        if not isinstance(logger, Namespace) or not logger["class_path"].endswith(f".{WandbLogger.__name__}"):
            continue
        if logger["init_args"].get("save_dir") in (None, ".") and logger["init_args"].get("dir") is None:
            logger["init_args"]["save_dir"] = str(run_dir)
