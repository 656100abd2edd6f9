"""`export` of something that is no checkpoint names the one that was meant."""

from pathlib import Path

import pytest

from lit_align.checkpoint_io import WholeCheckpointIO


@pytest.fixture
def run_dir():
    """A run, the newest of its stage, beside an older one; relative to the working directory."""
    for name in ("20260101-000000", "20260102-000000"):
        run = Path("runs/sft") / name
        WholeCheckpointIO().save_checkpoint({"n": 1}, run / "checkpoints" / "step000004.ckpt")
        (run / "hf").mkdir()
    (run / "checkpoints" / "cut.ckpt").write_bytes(b"PK")
    return run


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("given", ["runs/sft", "{run}/checkpoints", "{run}/hf", "{run}/checkpoints/cut.ckpt"])
def test_the_run_that_was_meant_is_named(given, linked, run_dir, cli):
    if linked:
        (run_dir.parent / "latest").symlink_to(run_dir.name)
    status, _, err = cli("export", "--checkpoint", given.format(run=run_dir), "--out", "out")
    meant = run_dir.parent / "latest" if linked and given == "runs/sft" else run_dir
    told = f"was cut; give the run folder {meant}, or one of its checkpoints: {meant}/checkpoints/step000004.ckpt"
    assert status == 1 and told in " ".join(err.split())


def test_where_there_is_none_it_says_what_is_expected(tmp_path, cli):
    (tmp_path / "empty").mkdir()
    status, _, err = cli("export", "--checkpoint", "empty", "--out", "out")
    assert status == 1 and "was cut; a run folder gives its newest whole one" in " ".join(err.split())
