"""One process of the comparison: started, watched, and what it measured read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.settings import REPOSITORY, Case, Settings


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        model: Folder of the model that is cut.
        scratch: Folder for weights, token ids and what the processes say; not kept.
        peers: Environment of the peer of SFT, DPO and RM.
        peers_ppo: Environment of the peer of PPO.
    """

    model: Path
    scratch: Path
    peers: Path
    peers_ppo: Path


def run(case: Case, variant: str, places: Places, settings: Settings, forced: bool = False) -> dict[str, Any]:
    """One process; what it measured.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    folder = places.scratch / case.name
    out, log = folder / f"{variant}.json", folder / f"{variant}.log"
    if variant == "ours":
        command = [sys.executable, "-m", "benchmarks.ours", case.name, str(folder), str(out)]
    elif case.stage == "ppo":
        python = places.peers_ppo / "bin" / "python"
        command = [str(python), "-m", "benchmarks.peers.trl_ppo", variant, str(folder), str(out)]
    else:
        python = places.peers / "bin" / "python"
        command = [str(python), "-m", "benchmarks.peers.trl_side", case.name, variant, str(folder), str(out)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings.threads),
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    out.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command + ["--forced"] * forced, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, check=False
        )
    if done.returncode or not out.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise RuntimeError(f"{case.name}, {variant}: exit status {done.returncode}\n{tail}")
    return json.loads(out.read_text(encoding="utf-8"))
