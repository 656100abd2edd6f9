"""A run that is killed and started again with the same command is, bit for bit, the run that was never killed."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import killing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", killing.OPTIONS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, tmp_path):
    killing.finish(killing.start(stage, tmp_path / "whole"), tmp_path / "whole")
    steps = killing.kill_twice_and_resume(stage, tmp_path / "killed")
    assert steps[0] >= 4 and steps[1] >= 10
    assert killing.compare(tmp_path / "whole", tmp_path / "killed", steps[-1]) == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_sigterm_writes_a_checkpoint_at_the_next_step_and_ends_with_143(stage, tmp_path):
    killing.finish(killing.start(stage, tmp_path / "whole"), tmp_path / "whole")
    process = killing.start(stage, tmp_path / "stopped")
    assert killing.stop_after(process, tmp_path / "stopped", 4, signal.SIGTERM) == 143
    checkpoint = tmp_path / "stopped" / "checkpoints" / "preempted.ckpt"
    step = killing.newest_step(tmp_path / "stopped")
    assert checkpoint.is_file() and step >= 5
    assert f"SIGTERM: the run stops after step {step}" in (tmp_path / "stopped.log").read_text()
    killing.finish(killing.start(stage, tmp_path / "stopped"), tmp_path / "stopped")
    # Nothing is lost: what was logged before the signal is there too.
    assert killing.compare(tmp_path / "whole", tmp_path / "stopped", since=0) == []
