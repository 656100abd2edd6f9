"""Stages in a row, each in a process of its own and each starting from what earlier ones exported.

Nothing heavy is imported here: the work is done by `python -m lit_align fit`.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_align import runs

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SECONDS_BETWEEN_LINES = 15.0
LINES_OF_A_FAILURE = 15


@dataclass
class Step:
    """One stage of a pipeline.

    Attributes:
        name: Names its folder, `<run_dir>/<name>`; later steps start from it under this name.
        config: Configuration file of the fit command, or several, the later ones on top.
        start: Option -> name of an earlier step, whose export it is set to: {model.policy.path: sft}.
        overrides: Option -> value: {trainer.max_epochs: 2}.
    """

    name: str
    config: str | list[str]
    start: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def configs(self) -> list[str]:
        """Its configuration files."""
        return [self.config] if isinstance(self.config, str) else list(self.config)

    def command(self, run_dir: Path, seed: int) -> list[str]:
        """What trains it."""
        starts = {option: str(run_dir / name / runs.EXPORT) for option, name in self.start.items()}
        settings = {**self.overrides, **starts, "seed_everything": seed, "run_dir": str(run_dir / self.name)}
        configs = [part for file in self.configs for part in ("--config", file)]
        options = [f"--{option}={_written(value)}" for option, value in settings.items()]
        return [sys.executable, "-m", "lit_align", "fit", *configs, *QUIET, *options]


@dataclass
class Achieved:
    """What a step achieved.

    Attributes:
        name: The step's.
        seconds: From start to end of its process.
        values: Value of each column of the table; None where the stage does not have it.
    """

    name: str
    seconds: float
    values: dict[str, float | None]


def pipeline(
    stages: list[Step],
    table: dict[str, str | list[str]],
    seed: int = 42,
    run_dir: Path | None = None,
    watch: str = "train/loss",
) -> None:
    """Runs stages in a row and ends with a table of what each achieved.

    Args:
        stages: The stages, in order.
        table: Heading of a column -> name of the metric in a stage's results.json, or several names of which a stage
            has one.
        seed: Of every stage.
        run_dir: Where the stages' run folders and the table go. Default: runs/pipeline/<time>.
        watch: Metric shown while a stage runs.

    Raises:
        ValueError: The pipeline cannot be, or a stage failed.
    """
    _check(stages)
    folder = _empty_folder(run_dir) if run_dir is not None else runs.choose_run_dir(runs.RUNS, "pipeline")
    print(f"pipeline: {' -> '.join(step.name for step in stages)}, in {folder}", flush=True)
    achieved = [_run(step, folder, seed, table, watch) for step in stages]
    text = markdown(achieved, list(table))
    (folder / "pipeline.md").write_text(text, encoding="utf-8")
    record = {"seed": seed, "stages": [vars(one) for one in achieved]}
    (folder / "pipeline.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{text}\n{folder / 'pipeline.md'}")


def markdown(achieved: Sequence[Achieved], columns: Sequence[str]) -> str:
    """The table, aligned so that it reads as plain text too."""
    rows = [["stage", *columns, "seconds"]]
    for one in achieved:
        values = [one.values.get(column) for column in columns]
        rows.append([one.name, *("" if v is None else f"{v:.3f}" for v in values), f"{one.seconds:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _check(stages: Sequence[Step]) -> None:
    if not stages:
        raise ValueError("stages: expected at least one stage, got none")
    before: list[str] = []
    for step in stages:
        if step.name in before:
            raise ValueError(f"stages: two are named {step.name!r}; their folders would be the same")
        for option, name in step.start.items():
            if name not in before:
                known = ", ".join(before) or "none, it is the first"
                raise ValueError(f"stages: {step.name}.start: {option} names {name!r}; stages before it: {known}")
        for file in step.configs:
            if not Path(file).is_file():
                raise ValueError(f"stages: {step.name}.config: there is no file {file} (seen from {Path.cwd()})")
        before.append(step.name)


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"run_dir: {folder} is not empty; give a new folder, so that no old result is taken for a new one"
        )
    return runs.given_run_dir(folder)


def _run(step: Step, folder: Path, seed: int, table: dict[str, str | list[str]], watch: str) -> Achieved:
    print(f"[{step.name}] {' + '.join(step.configs)}", flush=True)
    log, started = folder / f"{step.name}.log", time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(step.command(folder, seed), stdout=file, stderr=subprocess.STDOUT)
        try:
            _follow(process, step.name, folder / step.name / "metrics.csv", watch)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:])
        raise ValueError(f"stage {step.name} failed with exit status {process.returncode}; the end of {log}:\n{tail}")
    metrics = json.loads((folder / step.name / "results.json").read_text(encoding="utf-8"))["metrics"]
    values = {column: _first(metrics, names) for column, names in table.items()}
    shown = ", ".join(f"{column} {value:.3f}" for column, value in values.items() if value is not None)
    print(f"[{step.name}] {seconds:4.0f} s  {shown}", flush=True)
    return Achieved(step.name, round(seconds, 1), values)


def _follow(process: subprocess.Popen, name: str, metrics: Path, watch: str) -> None:
    """Waits for the process, with a line of progress now and then."""
    started, shown = time.perf_counter(), ""
    while True:
        try:
            process.wait(SECONDS_BETWEEN_LINES)
            return
        except subprocess.TimeoutExpired:
            state = last_value(metrics, watch)
            if state and state != shown:
                print(f"[{name}] {time.perf_counter() - started:4.0f} s  {state}", flush=True)
                shown = state


def last_value(metrics: Path, name: str) -> str:
    """The newest value of a metric in a CSV log, with its step; empty if there is none yet."""
    if not metrics.is_file():
        return ""
    with metrics.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return f"step {int(rows[-1]['step']) + 1}, {name} {float(rows[-1][name]):.4g}" if rows else ""


def _first(metrics: dict[str, float], names: str | list[str]) -> float | None:
    return next((metrics[name] for name in ([names] if isinstance(names, str) else names) if name in metrics), None)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
