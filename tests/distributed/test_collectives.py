"""What is logged, and the loss, cost no collective for a micro-batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "count_collectives.py"


@pytest.mark.slow
def test_ranks_ask_each_other_once_a_step_and_never_for_a_micro_batch(tiny_model, tmp_path):
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        SCRIPT,
        tiny_model,
        tmp_path / "out",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found, other = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2))
    # The meter's figures are of both ranks' work.
    together = found.pop("tokens") + other["tokens"]
    assert found.pop("useful") == pytest.approx(together) == pytest.approx(other["useful"])
    assert found.pop("steps") == 3 and found.pop("batches") == 12
    # Whether some rank was told to stop; the meter, once at the end. DDP's sums of gradients are not calls of Python.
    assert found.pop("all_reduce") == 3 + 1
    assert not any(found.values()), found
