"""Two real processes make the same update as one: losses, gradient norms, weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "run_stages.py"


def run(model: Path, out: Path, devices: int, accumulate: int) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--standalone"] if devices > 1 else []
    command = [sys.executable, *launch, SCRIPT, model, out, f"--devices={devices}", f"--accumulate={accumulate}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(devices)]


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory) -> tuple[dict, list[dict]]:
    """Of one process with whole steps, and of two with each step in 2 x 3 micro-batches."""
    folder = tmp_path_factory.mktemp("ddp")
    (one,) = run(tiny_model, folder / "one", 1, 1)
    return one, run(tiny_model, folder / "two", 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])
def test_two_processes_equal_one(stage, results):
    one, two = results[0][stage], [rank[stage] for rank in results[1]]
    for name, value in two[0]["weights"].items():
        assert torch.equal(value, two[1]["weights"][name]), f"{name} differs between the ranks"
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-5, atol=1e-6)
    names = {name for name, _ in one["logged"]}
    assert {"train/loss", "train/grad_norm"} <= names
    for name in names:
        want = [v for n, v in one["logged"] if n == name]
        assert [v for n, v in two[0]["logged"] if n == name] == pytest.approx(want, rel=1e-5, abs=1e-6), name
