"""A checkpoint is written whole or not at all; what was left half written is passed over, with a line saying so."""

import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from lit_align import runs
from lit_align.checkpoint_io import WholeCheckpointIO

WRITER = """
import sys, torch
from lit_align.checkpoint_io import WholeCheckpointIO
io, big = WholeCheckpointIO(), torch.zeros(4_000_000)
for n in range(1000):
    io.save_checkpoint({"n": n, "big": big + n}, sys.argv[1] + "/one.ckpt")
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(tmp_path, repository, capsys):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    part, done = folder / "one.ckpt.part", folder / "one.ckpt"
    caught = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=repository)
        deadline = time.monotonic() + 60
        # Once a whole one is there, the next one is caught while it grows.
        while not (done.exists() and part.exists() and part.stat().st_size > 2_000_000):
            assert time.monotonic() < deadline and process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        caught += part.exists()
        content = torch.load(done, weights_only=True)
        assert bool((content["big"] == content["n"]).all())
        assert runs.last_checkpoint(tmp_path) == done
        line = capsys.readouterr().err
        assert not part.exists() or f"{part}: this checkpoint was not written to its end; going on from one" in line
        done.unlink()
    assert caught > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_checkpoint_that_was_cut_is_passed_over_with_a_line(share, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    WholeCheckpointIO().save_checkpoint({"n": 1}, folder / "a.ckpt")
    time.sleep(0.02)
    cut = folder / "b.ckpt"
    WholeCheckpointIO().save_checkpoint({"n": torch.zeros(1000)}, cut)
    cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * share)])
    assert runs.last_checkpoint(tmp_path) == folder / "a.ckpt"
    assert f"{cut}: this checkpoint was not written to its end; going on from a.ckpt" in capsys.readouterr().err


def test_nothing_but_cut_checkpoints_is_an_error(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "a.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"holds no whole \*.ckpt"):
        runs.last_checkpoint(tmp_path)
    assert "there is no older one" in capsys.readouterr().err


def test_a_checkpoint_lies_on_the_disk_under_its_own_name_alone(tmp_path):
    WholeCheckpointIO().save_checkpoint({"n": 1}, tmp_path / "deep" / "a.ckpt")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.ckpt"]
    assert zipfile.is_zipfile(tmp_path / "deep" / "a.ckpt")
