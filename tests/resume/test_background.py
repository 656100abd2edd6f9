"""Checkpoints that are written while training goes on: of the right moment, whole, in order, none lost in silence."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_align import checkpoint_io, runs
from lit_align.background_io import BackgroundCheckpointIO, snapshot
from lit_align.callbacks import Checkpoints
from lit_align.models.source import ModelSource
from lit_align.stages import LitSFT
from lit_align.strategies import FSDP2Strategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
sys.path.insert(0, str(Path(__file__).parent))
import conftest as made
import killing


@pytest.fixture
def io():
    io = BackgroundCheckpointIO()
    yield io
    io.teardown()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits for it."""
    opened, real = threading.Event(), checkpoint_io._write

    def write(content, path):
        assert opened.wait(30)
        real(content, path)

    monkeypatch.setattr(checkpoint_io, "_write", write)
    yield opened
    opened.set()


def content(path):
    return torch.load(path, weights_only=True)


def test_what_is_written_is_of_the_moment_it_was_asked_for(io, gate, tmp_path):
    weight, numbers = torch.zeros(3), [1, 2]
    io.save_checkpoint({"weight": weight, "groups": [{"lr": 0.1, "betas": numbers}]}, tmp_path / "a.ckpt")
    weight += 1
    numbers.append(3)
    assert not (tmp_path / "a.ckpt").exists()
    gate.set()
    io.wait()
    assert content(tmp_path / "a.ckpt")["weight"].tolist() == [0, 0, 0]
    assert content(tmp_path / "a.ckpt")["groups"] == [{"lr": 0.1, "betas": [1, 2]}]


def test_tied_weights_are_copied_and_written_once(io, tmp_path):
    weight = torch.randn(1000, 100)
    state = {"embedding": weight, "head": weight, "transposed": weight.T}
    copied = snapshot(state)
    assert copied["embedding"] is copied["head"] and copied["head"].data_ptr() != weight.data_ptr()
    assert torch.equal(copied["transposed"], weight.T)
    io.save_checkpoint({"embedding": weight, "head": weight}, tmp_path / "a.ckpt")
    io.wait()
    assert (tmp_path / "a.ckpt").stat().st_size < 1.1 * weight.nbytes
    assert all(torch.equal(value, weight) for value in content(tmp_path / "a.ckpt").values())


def test_older_ones_are_removed_once_the_newer_is_there_and_one_is_under_way_at_a_time(io, gate, tmp_path):
    gate.set()
    io.save_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    io.wait()
    gate.clear()
    io.save_checkpoint({"n": 2}, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    threading.Timer(0.3, gate.set).start()
    time.sleep(0.1)
    assert (tmp_path / "a.ckpt").exists() and not (tmp_path / "b.ckpt").exists()
    io.save_checkpoint({"n": 3}, tmp_path / "c.ckpt")
    assert (tmp_path / "b.ckpt").exists() and not (tmp_path / "a.ckpt").exists(), "the third waited for the second"


def test_what_cannot_be_written_is_an_error_and_costs_no_older_one(io, monkeypatch, tmp_path):
    io.save_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    io.wait()

    def full(content, path):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "_write", full)
        io.save_checkpoint({"n": 2}, tmp_path / "b.ckpt")
        io.remove_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(OSError, match="no space left"):
            io.save_checkpoint({"n": 3}, tmp_path / "c.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
        io.save_checkpoint({"n": 3}, tmp_path / "c.ckpt")
        with pytest.raises(OSError, match="no space left"):
            io.teardown()
    assert content(tmp_path / "a.ckpt") == {"n": 1}


class Watch(Callback):
    """Looks at the folder after every micro-batch."""

    def __init__(self, folder):
        self.folder, self.seen, self.under_way = folder, [], 0

    def on_train_batch_end(self, trainer, *_):
        whole = [path.name for path in self.folder.glob("step*.ckpt") if runs.is_whole(path)]
        link = self.folder / "last.ckpt"
        assert not link.is_symlink() or link.exists(), "last.ckpt points at nothing"
        assert whole or not self.seen, "the last whole checkpoint is gone"
        self.under_way += not all(future.done() for future in trainer.strategy.checkpoint_io._under_way)
        self.seen += whole


def test_a_run_always_has_a_whole_checkpoint_and_ends_with_the_newest_two(tiny_model, monkeypatch, tmp_path):
    real = checkpoint_io._write

    def slow(content, path):
        real(content, path)
        time.sleep(0.05)

    monkeypatch.setattr(checkpoint_io, "_write", slow)
    folder = tmp_path / "checkpoints"
    watch = Watch(folder)
    trainer = Trainer(
        **{**made.QUIET, "enable_checkpointing": True},
        default_root_dir=str(tmp_path),
        max_epochs=3,
        limit_val_batches=0,
        callbacks=[Checkpoints(str(folder), 1), watch],
        plugins=[BackgroundCheckpointIO()],
    )
    data = made.ExampleData(made.conversations.__wrapped__(), batch_size=8)
    trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=data)
    steps = trainer.global_step
    assert steps >= 6 and watch.under_way > 0, "training has to go on while one is written"
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt",
        f"step{steps - 1:06d}.ckpt",
        f"step{steps:06d}.ckpt",
    ]
    assert os.readlink(folder / "last.ckpt") == f"step{steps:06d}.ckpt"
    assert content(folder / "last.ckpt")["global_step"] == steps


def test_one_that_the_thread_removes_while_the_folder_is_looked_through_is_no_error(monkeypatch, tmp_path):
    paths = [tmp_path / f"step{n:06d}.ckpt" for n in range(4)]
    for number, path in enumerate(paths):
        path.touch()
        os.utime(path, (number, number))

    def found(self, pattern):
        yield from paths
        paths[0].unlink()

    monkeypatch.setattr(Path, "glob", found)
    removed = []
    strategy = SimpleNamespace(remove_checkpoint=removed.append)
    Checkpoints(str(tmp_path))._remove_others(SimpleNamespace(is_global_zero=True, strategy=strategy))
    assert removed == paths[:2]


def test_a_full_disk_ends_the_run_with_what_is_wrong(tiny_model, monkeypatch, tmp_path):
    def full(content, path):
        raise OSError("no space left on the disk")

    monkeypatch.setattr(checkpoint_io, "_write", full)
    trainer = Trainer(
        **{**made.QUIET, "enable_checkpointing": True},
        default_root_dir=str(tmp_path),
        max_steps=1,
        limit_val_batches=0,
        callbacks=[Checkpoints(str(tmp_path / "checkpoints"))],
        plugins=[BackgroundCheckpointIO()],
    )
    data = made.ExampleData(made.conversations.__wrapped__(), batch_size=8)
    with pytest.raises(OSError, match="no space left on the disk"):
        trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=data)


def test_shards_are_not_written_in_the_background(monkeypatch):
    strategy = FSDP2Strategy()
    strategy.checkpoint_io = BackgroundCheckpointIO()
    monkeypatch.setattr(FSDP2Strategy, "shards", True)
    with pytest.raises(ValueError, match="checkpoint_async: under fsdp2"):
        strategy.setup(None)


WRITER = """
import sys, torch
from lit_align.background_io import BackgroundCheckpointIO
io, big = BackgroundCheckpointIO(), torch.zeros(4_000_000)
for n in range(1000):
    io.save_checkpoint({"n": n, "big": big}, f"{sys.argv[1]}/step{n:06d}.ckpt")
    if n:
        io.remove_checkpoint(f"{sys.argv[1]}/step{n - 1:06d}.ckpt")
    big += 1
"""


def growing(folder):
    """Whether a checkpoint is there, and another one grows."""
    with suppress(FileNotFoundError):
        return bool(list(folder.glob("*.ckpt"))) and any(p.stat().st_size > 2_000_000 for p in folder.glob("*.part"))


def test_a_kill_while_one_is_written_leaves_the_older_one(tmp_path, repository):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=repository)
    deadline = time.monotonic() + 150
    while not growing(folder):
        assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = content(runs.last_checkpoint(tmp_path))
    assert bool((found["big"] == found["n"]).all())


ASYNC = "--checkpoint_async=true"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", pytest.param("ppo", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, tmp_path):
    killing.finish(killing.start(stage, tmp_path / "whole"), tmp_path / "whole")
    killed = tmp_path / "killed"
    steps = killing.kill_and_resume(stage, killed, ASYNC, after=(6,))
    assert killing.compare(tmp_path / "whole", killed, steps[-1]) == []
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert len(left) == 3 and left[0] == "last.ckpt" and content(killed / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_sigterm_waits_for_the_checkpoint(tmp_path):
    folder = tmp_path / "stopped"
    assert killing.stop_after(killing.start("sft", folder, ASYNC), folder, 4, signal.SIGTERM) == 143
    step = killing.newest_step(folder)
    assert (folder / "checkpoints" / f"preempted-step{step:06d}.ckpt").is_file() and step >= 5
    assert not list((folder / "checkpoints").glob("*.part"))
