"""Real runs of the command line that are killed and started again with the same command, beside one that is not.

As a script it prints the table of the documentation:  python tests/resume/killing.py FOLDER
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = (
    "--trainer.callbacks=[]",
    "--trainer.limit_val_batches=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.num_workers=2",
    "--checkpoint_every=2",
    "--resume=true",
)
OPTIONS = {
    "pt": ("--data.batch_size=4", "--data.block_size=64", "--trainer.max_epochs=2", "--trainer.max_steps=40"),
    "sft": ("--data.batch_size=16", "--trainer.max_steps=40", "--trainer.accumulate_grad_batches=2"),
    "rm": ("--data.batch_size=16", "--trainer.max_steps=40"),
    "dpo": ("--data.batch_size=16", "--trainer.max_steps=30"),
    "ppo": (
        "--data.batch_size=8",
        "--model.sampling.max_new_tokens=12",
        "--model.ppo.target_kl=0.5",
        "--model.ppo.kl_horizon=1000",
        "--model.ppo.scale_rewards=true",
        "--trainer.max_epochs=8",
    ),
}
SECONDS = 120


def start(stage: str, run_dir: Path, *options: str) -> subprocess.Popen:
    """A run of the stage in a process of its own, with loader workers."""
    command = [sys.executable, "-m", "lit_align", "fit", "--config", f"configs/{stage}.yaml", f"--run_dir={run_dir}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "LIT_ALIGN_CACHE": str(run_dir.parent / "cache"),
    }
    output = open(run_dir.parent / f"{run_dir.name}.log", "a")  # noqa: SIM115 (the process writes to it)
    return subprocess.Popen(
        [*command, *COMMON, *OPTIONS[stage], *options],
        cwd=REPOSITORY,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, run_dir: Path) -> None:
    """Waits for a run that has to end by itself."""
    status = process.wait(SECONDS)
    assert status == 0, (run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:]


def stop_after(process: subprocess.Popen, run_dir: Path, step: int, sent: signal.Signals, delay: float = 0.0) -> int:
    """Sends a signal to the whole process group some time after a checkpoint of a step is there; the exit status.

    Of that step or a later one: where the machine is busy, this process may sleep until the first is gone again.
    """
    deadline = time.monotonic() + SECONDS
    while max((int(path.stem[4:]) for path in run_dir.glob("checkpoints/step*.ckpt")), default=0) < step:
        assert process.poll() is None, "the run ended before it was stopped"
        assert time.monotonic() < deadline, "the run never came to its checkpoint"
        time.sleep(0.005)
    time.sleep(delay)
    # To the loader's workers too, as job schedulers do.
    os.killpg(process.pid, sent)
    return process.wait(SECONDS)


def kill_and_resume(stage: str, run_dir: Path, *options: str, after: tuple[int, ...] = (4, 10)) -> list[int]:
    """Kills a run at moments of no particular kind, then lets it end; the steps that it went on from."""
    moments, steps = random.Random(stage), []
    for step in after:
        status = stop_after(start(stage, run_dir, *options), run_dir, step, signal.SIGKILL, moments.uniform(0, 0.2))
        assert status == -signal.SIGKILL
        assert not (run_dir / "results.json").exists(), "the run was over before it was killed"
        steps.append(newest_step(run_dir))
    finish(start(stage, run_dir, *options), run_dir)
    return steps


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint of the folder."""
    from lit_align import runs

    return int(torch.load(runs.last_checkpoint(run_dir), weights_only=True)["global_step"])


def metrics(run_dir: Path) -> dict[tuple[int, str], str]:
    """What was logged: (step, name) -> value as written; the parts of a run that was resumed are put together.

    Not how fast it was (`perf/`): no two runs agree on that.
    """
    values = {}
    for path in sorted(run_dir.glob("metrics*.csv"), key=lambda path: path.stat().st_mtime_ns):
        with path.open() as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                logged = {name: value for name, value in row.items() if value and not name.startswith("perf/")}
                values |= {(step, name): value for name, value in logged.items()}
    return values


def state(run_dir: Path) -> dict[str, Any]:
    """All that the last checkpoint holds of the run's future: weights, optimizer, schedule, data, random numbers."""
    path = max((run_dir / "checkpoints").glob("step*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    kept = {k: checkpoint[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}
    modules = {k: v for k, v in checkpoint.items() if k.endswith("DataModule")}
    return (
        kept | modules | {"random": checkpoint["callbacks"]["RandomState"], "ppo": checkpoint["lit_align"].get("ppo")}
    )


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of the entries that are not bit for bit the same."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [name]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{name}.{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{name}[{i}]")]
    return [] if one == other else [name]


def compare(whole: Path, resumed: Path, since: int) -> list[str]:
    """What differs between two runs: the state at the end, and every value logged after a step."""
    want, got = metrics(whole), metrics(resumed)
    found = differences(state(whole), state(resumed))
    missing = [key for key in want if key[0] >= since and key not in got]
    other = [key for key in got if want.get(key) != got[key]]
    return found + [f"not logged: {key}" for key in missing] + [f"logged otherwise: {key}" for key in other]


def main(folder: Path) -> None:
    """Prints the table."""
    print("| stage | killed twice; went on from steps | of | what differs at the end |\n|---|---|---|---|")
    for stage in OPTIONS:
        here = folder / stage
        here.mkdir(parents=True)
        finish(start(stage, here / "whole"), here / "whole")
        steps = kill_and_resume(stage, here / "killed")
        found = compare(here / "whole", here / "killed", steps[-1])
        total = torch.load(max((here / "whole" / "checkpoints").glob("step*.ckpt")), weights_only=True)["global_step"]
        print(f"| {stage} | {steps[0]}, {steps[1]} | {total} | {', '.join(found) or 'nothing'} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main(Path(sys.argv[1]).resolve())
