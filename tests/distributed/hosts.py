"""Starts the command line as several hosts would: torchrun's agents or srun's tasks, each a process of its own."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 200
COMMON = (
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[]",
    "--trainer.limit_val_batches=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=4",
    "--data.batch_size=8",
    "--data.validation=null",
    "--checkpoint_every=2",
    "--meter=false",
)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fit(stage: str, *options: str) -> list[str]:
    """The module's own arguments."""
    return ["-m", "lit_align", "fit", f"--config={REPOSITORY / 'configs' / stage}.yaml", *COMMON, *options]


def absolute(stage: str) -> tuple[str, ...]:
    """The files of the stage's configuration, named so that any working directory will do."""
    demo = REPOSITORY / "datamodules" / "demo"
    start, data = {"sft": ("pt", "sft"), "dpo": ("sft", "preference")}[stage]
    return f"--model.policy.path={demo}/assets/{start}", f"--data.train={demo}/corpus/{data}.train.jsonl"


class Processes:
    """Processes with a watchdog; at the end none is left.

    Args:
        folder: Where they run, and write `log.<number>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        """Starts Python; `inside` is a command that starts it somewhere else."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC", "LIT_ALIGN"))}
        settings = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "LIT_ALIGN_CACHE": str(self.folder / "cache"),
        }
        with open(self.log(len(self.started)), "w") as log:
            self.started.append(
                subprocess.Popen(
                    [*inside, sys.executable, *arguments],
                    env=clean | settings | dict(environment or {}),
                    cwd=cwd or self.folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def log(self, number: int) -> Path:
        """What a process said."""
        return self.folder / f"log.{number}"

    def said(self) -> str:
        """The end of what all of them said."""
        return "\n".join(f"--- {n}\n{self.log(n).read_text()[-3000:]}" for n in range(len(self.started)))

    def statuses(self) -> list[int]:
        """Exit statuses, once all have ended; a failure of one kills the others after a while."""
        until = time.monotonic() + SECONDS
        while any(process.poll() is None for process in self.started):
            assert time.monotonic() < until, f"still running after {SECONDS} s\n{self.said()}"
            time.sleep(0.1)
        return [process.returncode for process in self.started]


def one(folder: Path, arguments: Sequence[str]) -> None:
    """One process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with Processes(folder) as processes:
        processes.start(arguments)
        assert processes.statuses() == [0], processes.said()


def torchrun(
    folder: Path,
    arguments: Sequence[str],
    cwds: Sequence[Path] = (),
    inside: Sequence[Sequence[str]] = (),
    **options: str,
) -> tuple[list[int], str]:
    """Two agents with one process each: exit statuses, and what was said."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"master-addr": "127.0.0.1", "master-port": str(free_port()), "nproc-per-node": "1", **options}
    with Processes(folder) as processes:
        for rank in range(2):
            launch = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            launch += [f"--{name}={value}" for name, value in given.items()]
            hosts = ["--trainer.num_nodes=2", "--trainer.devices=1"]
            processes.start(
                [*launch, *arguments, *hosts],
                cwd=cwds[rank] if cwds else None,
                inside=inside[rank] if inside else (),
            )
        return processes.statuses(), processes.said()


def slurm(rank: int, port: int, job: str = "4711") -> dict[str, str]:
    """What srun tells the second of two tasks on two nodes, and the first."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "align",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(port),
    }


def losses(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> logged value, for losses and gradient norms."""
    found = {}
    for path in sorted(run_dir.glob("metrics*.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                values = {k: v for k, v in row.items() if v and k.startswith("train/") and k != "train/seconds"}
                found |= {(int(row["step"]), name): float(value) for name, value in values.items()}
    return found
