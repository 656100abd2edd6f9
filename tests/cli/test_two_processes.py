import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2", "--model=toy_align.LitToy", "--data=toy_align.ToyData")


def launch(*args):
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent / "toy")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_align", "fit", *TWO, "--data.path=x", "--trainer.accelerator=cpu", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_share_one_run_folder_and_each_keeps_its_random_state():
    launch("--trainer.max_epochs=1")
    (folder,) = [path for path in Path("runs/toy").iterdir() if not path.is_symlink()]
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "results.json"}
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    first, second = checkpoint["callbacks"]["RandomState"]["ranks"]
    assert set(first) == set(second)
