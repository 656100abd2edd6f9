"""A SIGTERM to one rank, before the first step, stops all ranks after it: nobody waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_align.runs import is_whole

SCRIPT = Path(__file__).parent / "stop_early.py"


@pytest.mark.slow
@pytest.mark.parametrize("rank, strategy", [(0, "ddp"), (1, "ddp"), (1, "fsdp2")])
def test_all_ranks_stop_after_the_first_step(rank, strategy, tiny_model, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, *launch, SCRIPT, tiny_model, tmp_path, str(rank), strategy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_whole(tmp_path / "preempted-step000001.ckpt")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["preempted-step000001.ckpt", "rank0-stopped-at-1", "rank1-stopped-at-1"]
