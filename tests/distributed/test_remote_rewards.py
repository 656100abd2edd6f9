"""Each of two processes asks a reward server for its own answers, and for no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rollout.reward_server import Judge, serving

SCRIPT = Path(__file__).parent / "run_remote_rewards.py"


def run(model: Path, out: Path, devices: int) -> tuple[Judge, list[dict]]:
    judge = Judge(lambda asked: [len(answer) / 10 for answer in asked["answers"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--standalone"] if devices > 1 else []
    with serving(judge) as url:
        command = [sys.executable, *launch, SCRIPT, model, out, url, f"--devices={devices}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return judge, [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(devices)]


def asked(judge: Judge, rank: str | None = None) -> list[tuple[str, str]]:
    kept = [r for r, headers in zip(judge.requests, judge.headers, strict=True) if rank in (None, headers["X-Rank"])]
    return sorted(pair for request in kept for pair in zip(request["prompts"], request["answers"], strict=True))


@pytest.mark.slow
def test_two_processes_ask_for_what_one_asks_for(tiny_model, tmp_path):
    one, (expected,) = run(tiny_model, tmp_path / "one", 1)
    two, (first, second) = run(tiny_model, tmp_path / "two", 2)
    assert len(asked(one)) == 14 and asked(two) == asked(one)
    assert sorted(asked(two, "0") + asked(two, "1")) == asked(one)
    assert {len(asked(two, "0")), len(asked(two, "1"))} == {6, 8}
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
