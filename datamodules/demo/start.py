"""Makes the small models that the configurations start from, by running the stages on the committed corpus."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

STARTS = {"pt": {}, "sft": {"model.policy.path": "pt"}, "rm": {"model.reward_model.path": "sft"}}
"""Stage -> option that names what it starts from -> stage that it starts from."""


def write_assets(out: Path, seed: int) -> None:
    """Trains PT, SFT and RM as configs/ says and keeps the exports, in bfloat16; run it from the repository's root."""
    with TemporaryDirectory() as folder:
        for stage, starts in STARTS.items():
            run = Path(folder) / stage
            paths = [f"--{option}={Path(folder) / name / 'hf'}" for option, name in starts.items()]
            command = [sys.executable, "-m", "lit_align", "fit", "--config", f"configs/{stage}.yaml"]
            subprocess.run([*command, *paths, f"--seed_everything={seed}", f"--run_dir={run}"], check=True)
            shutil.rmtree(out / stage, ignore_errors=True)
            shutil.copytree(run / "hf", out / stage)
            _halve(out / stage / "model.safetensors")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.2f} MB")


def _halve(file: Path) -> None:
    """Rewrites the weights in bfloat16; the scalar head stays in float32."""
    state = {k: v if k.startswith("score.") else v.to(torch.bfloat16) for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
