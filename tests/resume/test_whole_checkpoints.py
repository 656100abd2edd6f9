"""A checkpoint is written whole or not at all; what was left half written is passed over, with a line saying so."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from lit_align import runs
from lit_align.checkpoint_io import WholeCheckpointIO, WholeFolder
from lit_align.sharded_checkpoint import read_whole, write_shards

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
        deadline = time.monotonic() + 150  # imports on a busy machine
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


@pytest.mark.parametrize("keep", [None, 100])
def test_a_sharded_checkpoint_without_one_of_its_files_is_passed_over(keep, tmp_path, capsys):
    """Lost, or cut, on the way from one disk to another."""
    for n in (1, 2):
        _write_folder(tmp_path / "checkpoints" / f"step{n:06d}.ckpt", n)
    newest = runs.last_checkpoint(tmp_path)
    (shard,) = newest.glob("*.distcp")
    content = shard.read_bytes()
    shard.unlink()
    if keep is not None:
        shard.write_bytes(content[:keep])
    assert not runs.is_whole(newest)
    assert runs.last_checkpoint(tmp_path).name == "step000001.ckpt"
    assert "step000002.ckpt: this checkpoint was not written to its end" in capsys.readouterr().err


LIGHTNING_S = {"state_dict": {}, "pytorch-lightning_version": "2.6", "global_step": 2}


def _write_shards_of(path, content):
    folder = WholeFolder(path)
    folder.begin()
    folder.finish(write_shards(folder.part, content, []))


@pytest.mark.parametrize(
    "write", [lambda path, content: WholeCheckpointIO().save_checkpoint(content, path), _write_shards_of]
)
def test_weights_alone_are_passed_over_whatever_their_name(write, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    write(folder / "step000001.ckpt", LIGHTNING_S | {"optimizer_states": []})
    for name in ("step000002.ckpt", "epoch=1-step=2.ckpt"):
        write(folder / name, LIGHTNING_S)
    assert runs.is_whole(folder / "step000002.ckpt")
    assert runs.last_checkpoint(tmp_path).name == "step000001.ckpt"
    told = (
        "step=2.ckpt: this checkpoint holds weights alone, without the optimizer's state; going on from step000001.ckpt"
    )
    assert told in capsys.readouterr().err
    write(folder / "epoch=2-step=3.ckpt", LIGHTNING_S | {"optimizer_states": []})
    assert runs.last_checkpoint(tmp_path).name == "epoch=2-step=3.ckpt", "a user's own may be the newest"


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


FOLDER_WRITER = """
import sys, torch
from pathlib import Path
from lit_align.checkpoint_io import WholeFolder
from lit_align.sharded_checkpoint import write_shards
big = torch.zeros(4_000_000)
for n in range(1000):
    folder = WholeFolder(Path(sys.argv[1]) / "one.ckpt")
    folder.begin()
    folder.finish(write_shards(folder.part, {"state_dict": {"big": big + n}, "n": n}, []))
"""


def test_a_kill_while_a_sharded_checkpoint_is_written_leaves_the_older_one(tmp_path, repository):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", FOLDER_WRITER, str(folder)], cwd=repository)
    deadline = time.monotonic() + 100
    while not ((folder / "one.ckpt").exists() and any((folder / f"one.ckpt{runs.PART}").glob("*.distcp"))):
        assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    _check_content(runs.last_checkpoint(tmp_path))


def _check_content(path, n=None):
    content = read_whole(path)
    assert bool((content["state_dict"]["big"] == content["n"]).all()) and n in (None, content["n"])


def _write_folder(path, n):
    folder = WholeFolder(path)
    folder.begin()
    folder.finish(write_shards(folder.part, {"state_dict": {"big": torch.zeros(10) + n}, "n": n}, []))


@pytest.mark.parametrize("cut", range(6))
def test_between_any_two_changes_of_names_there_is_a_whole_checkpoint(cut, tmp_path, monkeypatch):
    """One of the same name is there already: a run writes it twice when a signal comes at the wrong moment."""
    path, calls = tmp_path / "checkpoints" / "step000004.ckpt", []
    path.parent.mkdir()
    _write_folder(path, 1)

    class Killed(BaseException):
        """In the place of a signal."""

    def until(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) > cut:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (shutil, "rmtree"), (os, "fsync")):
            patch.setattr(owner, name, until(getattr(owner, name)))
        with suppress(Killed, CheckpointException):  # torch wraps what is raised in its own writing
            _write_folder(path, 2)
    _check_content(runs.last_checkpoint(tmp_path))
    _write_folder(path, 3)  # what was left lying about is no hindrance
    _check_content(path, 3)
    assert [left.name for left in path.parent.iterdir()] == [path.name]


def test_half_of_a_removed_folder_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "a.ckpt"
    path.parent.mkdir()
    _write_folder(path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    WholeCheckpointIO().remove_checkpoint(path)
    with pytest.raises(ValueError, match=r"holds no whole \*.ckpt"):
        runs.last_checkpoint(tmp_path)


def test_what_a_kill_left_of_a_removal_goes_with_the_next_one(tmp_path, monkeypatch):
    for n in (1, 2, 3):
        _write_folder(tmp_path / f"step{n:06d}.ckpt", n)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        WholeCheckpointIO().remove_checkpoint(tmp_path / "step000001.ckpt")
    assert len(list(tmp_path.iterdir())) == 3
    WholeCheckpointIO().remove_checkpoint(tmp_path / "step000002.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step000003.ckpt"]


def test_a_file_takes_the_place_of_a_folder_and_the_other_way_round(tmp_path):
    path = tmp_path / "a.ckpt"
    WholeCheckpointIO().save_checkpoint({"n": 0}, path)
    _write_folder(path, 1)
    assert WholeCheckpointIO().load_checkpoint(path)["n"] == 1
    WholeCheckpointIO().save_checkpoint({"n": 2}, path)
    assert WholeCheckpointIO().load_checkpoint(path)["n"] == 2
    assert [left.name for left in tmp_path.iterdir()] == ["a.ckpt"]
