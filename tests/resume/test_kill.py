"""A run that is killed and started again with the same command is, bit for bit, the run that was never killed."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import killing

pytestmark = pytest.mark.slow


def grouped(*cases, long=()):
    """One process runs all tests of a stage, so that its run that is never killed is made once."""
    marks = {case[0]: [pytest.mark.xdist_group(f"kill-{case[0]}")] for case in cases}
    for stage in long:
        marks[stage].append(pytest.mark.long)
    return [pytest.param(*case, marks=marks[case[0]], id="-".join(case)) for case in cases]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of the stage's run that is never killed."""
    folders = {}

    def once(stage):
        if stage not in folders:
            folders[stage] = tmp_path_factory.mktemp(stage) / "whole"
            killing.finish(killing.start(stage, folders[stage]), folders[stage])
        return folders[stage]

    return once


@pytest.mark.parametrize("stage", grouped(*((stage,) for stage in killing.OPTIONS)))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, whole, tmp_path):
    after = (4, 10) if stage in ("sft", "ppo") else (6,)
    steps = killing.kill_and_resume(stage, tmp_path / "killed", after=after)
    assert all(step >= least for step, least in zip(steps, after, strict=True))
    assert killing.compare(whole(stage), tmp_path / "killed", steps[-1]) == []


@pytest.mark.parametrize("stage", grouped(("dpo",), long=["dpo"]))
def test_a_run_with_a_cached_reference_goes_on_as_if_nothing_had_happened(stage, tmp_path):
    option = "--model.reference_cache=true"
    killing.finish(killing.start(stage, tmp_path / "whole", option), tmp_path / "whole")
    assert list((tmp_path / "cache" / "reference").glob("*.safetensors"))
    steps = killing.kill_and_resume(stage, tmp_path / "killed", option, after=(6,))
    assert killing.compare(tmp_path / "whole", tmp_path / "killed", steps[-1]) == []


@pytest.mark.parametrize("stage", grouped(("sft",), ("ppo",), long=["ppo"]))
def test_sigterm_writes_a_checkpoint_at_the_next_step_and_ends_with_143(stage, whole, tmp_path):
    folder = tmp_path / "stopped"
    assert killing.stop_after(killing.start(stage, folder), folder, 4, signal.SIGTERM) == 143
    step = killing.newest_step(folder)
    assert (folder / "checkpoints" / f"preempted-step{step:06d}.ckpt").is_file() and step >= 5
    assert f"SIGTERM: the run stops after step {step}" in (tmp_path / "stopped.log").read_text()
    killing.finish(killing.start(stage, folder), folder)
    # Nothing is lost: what was logged before the signal is there too.
    assert killing.compare(whole(stage), folder, since=0) == []


TWO = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
ORDERS = {"two then one": (TWO, ()), "one then two": ((), TWO)}


@pytest.mark.parametrize("stage, order", grouped(("sft", "two then one"), ("ppo", "one then two"), long=["ppo"]))
def test_a_killed_run_goes_on_with_another_number_of_processes(stage, order, whole, tmp_path):
    """The losses of all steps are those of one process: the same examples in the same order."""
    folder, (first, then) = tmp_path / "other", ORDERS[order]
    killing.stop_after(killing.start(stage, folder, *first), folder, 4, signal.SIGKILL)
    step = killing.newest_step(folder)
    killing.finish(killing.start(stage, folder, *then), folder)
    want, got = killing.metrics(whole(stage)), killing.metrics(folder)
    steps = [n for n, name in want if name == "train/loss" and n >= step]
    assert len(steps) > 10
    for n in steps:
        assert float(got[n, "train/loss"]) == pytest.approx(float(want[n, "train/loss"]), rel=1e-4, abs=1e-6)


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    folder = tmp_path / "two"
    assert killing.stop_after(killing.start("rm", folder, *TWO), folder, 4, signal.SIGTERM) == 143
    assert killing.newest_step(folder) >= 5
