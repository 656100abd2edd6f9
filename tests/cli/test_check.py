"""`check` passes what does not depend on how the work is split, and finds what does."""

import math
import re

import pytest
import torch

from lit_align.__main__ import main
from lit_align.cli.measure import Measurement, compare

COMMON = ["--trainer.accelerator=cpu", "--data.batch_size=6"]


@pytest.fixture
def check(repository, monkeypatch, capsys, tmp_path):
    """Runs `check` on a configuration of the repository: (exit status, standard output, standard error)."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))

    def run(stage, *options, processes=1):
        args = ["--config", f"configs/{stage}.yaml", *COMMON, f"--processes={processes}", *options]
        status = main(["check", *args])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_of_the_library_passes(stage, check):
    status, out, _ = check(stage)
    assert status == 0, out
    assert re.search(r"padded on the left, 3 micro-batches +\d\.\de[-+]\d\d +\d\.\de-\d\d", out)
    assert "within 1e-05" in out


MEAN = """
from dataclasses import dataclass

from lit_align.losses import Sigmoid


@dataclass(frozen=True)
class MeanOfTheCall(Sigmoid):
    "Divides by the pairs that happen to stand in one call."

    def per_pair(self, pairs):
        return super().per_pair(pairs) / len(pairs.policy_chosen)
"""


@pytest.fixture
def wrong_loss(tmp_path, monkeypatch):
    """Option that selects a loss whose value depends on the split."""
    (tmp_path / "mean_of_the_call.py").write_text(MEAN)
    monkeypatch.syspath_prepend(tmp_path)
    return "--model.loss=mean_of_the_call.MeanOfTheCall"


def test_a_loss_that_depends_on_the_split_is_found(check, wrong_loss):
    status, out, _ = check("dpo", wrong_loss)
    assert status == 1 and "ABOVE 1e-05" in out


def test_the_tolerance_is_the_users(check, wrong_loss):
    status, out, _ = check("dpo", wrong_loss, "--tolerance=1000")
    assert status == 0 and "within 1000" in out


@pytest.mark.parametrize("where", [0, 1])
def test_what_is_no_number_agrees_with_nothing(where):
    def measured(nan):
        losses, gradients = [1.0, 2.0], [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
        if nan:
            losses[where] = math.nan
            gradients[where] = {"w": torch.tensor([1.0, math.nan])}
        return Measurement(losses, gradients)

    for one, other in ((False, True), (True, False), (True, True)):
        assert compare(measured(one), measured(other)) == (math.inf, math.inf)
    assert compare(measured(False), measured(False)) == (0.0, 0.0)


def test_nothing_is_written(check, repository):
    before = sorted(repository.glob("runs/*/*"))
    check("sft")
    assert sorted(repository.glob("runs/*/*")) == before


def test_a_wrong_configuration_is_one(check):
    status, _, err = check("dpo", "--model.lossy=AOT")
    assert status == 2 and "lossy" in err


@pytest.mark.slow
def test_two_processes_are_one_of_the_splits(check):
    status, out, err = check("rm", processes=2)
    assert status == 0, out + err
    assert "2 processes, 2 micro-batches each" in out
