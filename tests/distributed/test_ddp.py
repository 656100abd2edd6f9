"""Two real processes make the same update as one, whole copies (DDP) or shards (FSDP2): losses, norms, weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from run_stages import NAMES

SCRIPT = Path(__file__).parent / "run_stages.py"


def run(model: Path, out: Path, devices: int, accumulate: int, strategy: str) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--standalone"] if devices > 1 else []
    options = [f"--devices={devices}", f"--accumulate={accumulate}", f"--strategy={strategy}"]
    command = [sys.executable, *launch, SCRIPT, model, out, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(devices)]


@pytest.fixture(scope="module")
def one(tiny_model, tmp_path_factory) -> dict:
    """Of one process, with whole steps."""
    return run(tiny_model, tmp_path_factory.mktemp("one") / "out", 1, 1, "auto")[0]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tiny_model, tmp_path_factory) -> list[dict]:
    """Of two processes, with each step in 2 x 3 micro-batches."""
    return run(tiny_model, tmp_path_factory.mktemp(request.param) / "out", 2, 3, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name, one, two):
    want, first, second = one[name], two[0][name], two[1][name]
    assert want["weights"].keys() == first["weights"].keys()
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), f"{key} differs between the ranks"
        torch.testing.assert_close(value, want["weights"][key], rtol=1e-5, atol=1e-6)
    names = {name for name, _ in want["logged"]}
    assert {"train/loss", "train/grad_norm"} <= names
    for name in names:
        values = [v for n, v in want["logged"] if n == name]
        assert [v for n, v in first["logged"] if n == name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    norms = [v for n, v in want["logged"] if n == "train/grad_norm"]
    assert max(norms) > 0.1 and min(norms) > 0, "clipping has to be seen, and no step may be empty"


@pytest.mark.slow
def test_on_one_trunk_each_rank_holds_its_part_of_the_base_once(two):
    for rank in two:
        assert rank["ppo trunk"]["apart"] == ["base_model.model.score.original_module.weight"]  # peft's idle head
