"""Two processes share the making of reference log-probabilities, and read the same ones afterwards."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_align.models.reference_cache import write_logps

SCRIPT = Path(__file__).parent / "run_cached_dpo.py"


def start(model: Path, out: Path, cache: Path | str, devices: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--standalone"] if devices > 1 else []
    command = [sys.executable, *launch, SCRIPT, model, out, cache, f"--devices={devices}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def here():
    """The script's `run`, for runs of one process."""
    spec = importlib.util.spec_from_file_location("run_cached_dpo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


@pytest.mark.slow
def test_two_processes_with_the_cache_equal_one_without(here, tiny_model, tmp_path):
    live = here(str(tiny_model), "none", 1)
    done = start(tiny_model, tmp_path / "two", tmp_path / "cache", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    two = [torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in range(2)]
    for cached in (run for rank in two for run in rank):
        assert [name for name, _ in cached["logged"]] == [name for name, _ in live["logged"]]
        want = [value for _, value in live["logged"]]
        assert [value for _, value in cached["logged"]] == pytest.approx(want, rel=1e-5, abs=2e-6)
        for name, value in cached["weights"].items():
            torch.testing.assert_close(value, live["weights"][name], rtol=1e-5, atol=1e-6)
            assert torch.equal(value, two[0][0]["weights"][name]), f"{name} differs between ranks or runs"
    # One process finds what two have made, and would have made the same.
    (path,) = (tmp_path / "cache").glob("*")
    here(str(tiny_model), str(tmp_path / "cache"), 1)
    here(str(tiny_model), str(tmp_path / "own"), 1)
    assert [other.name for other in (tmp_path / "own").glob("*")] == [path.name]
    own = load_file(tmp_path / "own" / path.name)["logps"]
    torch.testing.assert_close(load_file(path)["logps"], own, rtol=1e-6, atol=1e-6)
    assert not (own == 0).any()


@pytest.mark.slow
def test_two_processes_refuse_a_wrong_table_together(here, tiny_model, tmp_path):
    here(str(tiny_model), str(tmp_path / "cache"), 1)
    (path,) = (tmp_path / "cache").glob("*")
    write_logps(path, load_file(path)["logps"] + 1.0)
    done = start(tiny_model, tmp_path / "two", tmp_path / "cache", 2)
    assert done.returncode != 0 and done.stderr.count("delete this file, so that it is made anew") >= 2
