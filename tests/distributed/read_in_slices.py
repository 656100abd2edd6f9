"""Reads a network on two ranks and says how much memory that took; started by the test under torchrun.

usage: torchrun --nproc-per-node 2 read_in_slices.py MODEL OUT
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_align.models.fingerprint import fingerprint
from lit_align.models.load import load_causal_lm
from lit_align.models.sharding import Sharding, building_in_shards
from lit_align.models.source import ModelSource


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own (RssAnon), and with the pages of files that it looks at (VmRSS)."""
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}


class Peak(threading.Thread):
    """Looks at the memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at = self.peak = resident()
        self.over = False

    def run(self) -> None:
        """Until `growth` is asked for."""
        while not self.over:
            now = resident()
            self.peak = {name: max(self.peak[name], now[name]) for name in now}
            time.sleep(0.005)

    def growth(self) -> dict[str, int]:
        """Most bytes in memory, less those at the start."""
        self.over = True
        self.join()
        return {name: self.peak[name] - self.start_at[name] for name in self.peak}


def main(model: str, out: str) -> None:
    """See the module."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    peak = Peak()
    peak.start()
    with building_in_shards(Sharding(mesh)):
        policy = load_causal_lm(ModelSource(path=model))
    shards = [parameter for parameter in policy.parameters() if isinstance(parameter, DTensor)]
    for shard in shards:
        shard.to_local().sum()  # what is read lies in the file until it is looked at
    growth = peak.growth()
    held = sum(shard.to_local().numel() * shard.element_size() for shard in shards)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    found = {**growth, "held": held, "whole": whole, "fingerprint": fingerprint(policy)}
    torch.save(found, f"{out}.{os.environ['RANK']}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
