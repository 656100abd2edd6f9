"""Runs tests against copies of the package. A script, started by test_mutations.

Reads [[folder, [node id, ...]], ...] as JSON from standard input: `folder` holds a copy of lit_align. Each pair runs
in a process of its own, forked after what all tests need has been imported, so that it costs little; its output goes to
log.txt in the folder. Prints the list of pytest's exit codes as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

# Every test that an edit names would import these again, and they take seconds.
import hypothesis
import lightning.pytorch
import pytest
import torch
import torch.distributed.tensor  # assert_close imports it when first called
import torch.utils.flop_counter
import transformers

LOADED = (hypothesis, lightning.pytorch, torch.distributed.tensor, torch.utils.flop_counter)
LOADED += (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSequenceClassification,
    transformers.DynamicCache,
)

REPOSITORY = Path(__file__).resolve().parents[2]
CRASHED, WRONG_PACKAGE = 98, 99


def run(folder: Path, nodes: list[str]) -> int:
    """Pytest's exit code for the tests, with lit_align imported from the folder."""
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path[:0] = [str(folder), str(REPOSITORY)]
    import lit_align.losses

    if not Path(lit_align.losses.__file__).is_relative_to(folder):
        return WRONG_PACKAGE
    # A configuration of its own and few plugins: they cost more than the tests.
    configuration = folder / "pytest.ini"
    unused = " ".join(f"-p no:{plugin}" for plugin in ("cacheprovider", "logging", "unraisableexception", "junitxml"))
    configuration.write_text(f"[pytest]\naddopts = --import-mode=importlib -x -q --noconftest {unused}\n")
    torch.manual_seed(0)
    tests = [str(REPOSITORY / "tests" / node) for node in nodes]
    return int(pytest.main(["-c", str(configuration), "--rootdir", str(REPOSITORY), *tests]))


def run_forked(folder: Path, nodes: list[str]) -> int:
    """The same in a child process."""
    child = os.fork()
    if child == 0:
        code = CRASHED
        try:
            code = run(folder, nodes)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)  # no worker threads, so forking is safe
    gc.freeze()  # children need not walk through what was imported here
    print(json.dumps([run_forked(Path(folder), nodes) for folder, nodes in json.load(sys.stdin)]))
