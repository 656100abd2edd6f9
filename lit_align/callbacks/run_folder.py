"""The run folder's record: the whole configuration at the start, what was achieved at the end."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

import lit_align
from lit_align import runs

VERSIONS_OF = ("torch", "lightning", "transformers", "peft", "datasets")


class SaveRun(SaveConfigCallback):
    """Writes `config.yaml` and `data.json` at the start of a run and `results.json` at its end.

    They go into `trainer.default_root_dir`. `data.json` is the data module's `report`: what became of its records.

    For validate, test and predict the files are `<command>.yaml` and `<command>.json`, so that they can go into the
    folder of the run that they look at. W&B gets the configuration too.

    Metrics are those that Lightning holds at the end, and whatever another callback has in a dictionary `results`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        # Lightning's own way writes to the logger's directory, and fails there on the second run.
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)
        self._started = time.perf_counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the configuration; that of a training run once its checkpoint, if any, was accepted."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the configuration; Lightning calls this on rank 0."""
        text = self.parser.dump(self.config, skip_unset=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        header = "".join(f"# {name} {number}\n" for name, number in versions().items())
        name = "config" if stage == "fit" else getattr(stage, "value", stage)
        path = folder / f"{name}.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != header + text:
            runs.set_aside(path)  # a resumed run may have other settings: the earlier ones stay on record
        path.write_text(header + text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _to_wandb(logger, text)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and writes down the configuration and what became of the records."""
        self._started = time.perf_counter()
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")
            if not trainer.fast_dev_run:
                runs.link_latest(Path(trainer.default_root_dir))
        _write_report(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `results.json`, and what became of records that were read while the model trained."""
        _write_report(trainer)
        self._write(trainer, pl_module, "results")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the validate command."""
        if trainer.state.fn == "validate":
            self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `validate.json`, when that is the command."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `test.json`."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            metrics |= getattr(callback, "results", {})
        results = {
            "stage": getattr(pl_module, "name", type(pl_module).__name__),
            "metrics": dict(sorted(metrics.items())),
            "seconds": round(time.perf_counter() - self._started, 2),
            "versions": versions(),
        }
        if trainer.state.fn == "fit":
            results |= {"steps": trainer.global_step, "epochs": trainer.current_epoch}
        path = Path(trainer.default_root_dir) / f"{name}.json"
        _write_json(path, results)
        print(f"run folder: {path.parent}")


def _write_report(trainer: Trainer) -> None:
    report = getattr(getattr(trainer, "datamodule", None), "report", None)
    as_dict = getattr(report, "as_dict", None)
    if trainer.is_global_zero and as_dict is not None:
        _write_json(Path(trainer.default_root_dir) / "data.json", as_dict())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + runs.PART)  # half a file would be taken for the end of the run
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def versions() -> dict[str, str]:
    """What the run ran on."""
    found = {"lit_align": lit_align.__version__, "python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # installed in another way than by a package; nothing depends on this
    return found


def _to_wandb(logger: WandbLogger, text: str) -> None:
    run = logger.experiment
    run.config.update(yaml.safe_load(text), allow_val_change=True)
    # Uploaded with the run. W&B keeps a config.yaml of its own, hence the name.
    (Path(run.dir) / "lit_config.yaml").write_text(text, encoding="utf-8")
