"""Traps: what leaves a mark if it is executed."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_align.__main__ import main


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


@pytest.fixture
def trap(mark):
    """A trap, and at the end of the test the proof that it did not close."""
    yield Trap(mark)
    assert not mark.exists(), "something that was read has been executed"


@pytest.fixture(autouse=True)
def _careless(tmp_path, monkeypatch):
    """The least careful surroundings: torch told to execute, and somebody who says yes to everything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("LIT_ALIGN_RUN_DIR", "LIT_ALIGN_DEBUG", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("evil", None)


@pytest.fixture
def group():
    """A process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)


@pytest.fixture
def cli(capsys):
    """Runs a command in this process: (exit status, standard error)."""

    def run(*args):
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def talks(tmp_path):
    """A file of four conversations."""
    path = Path(tmp_path / "talks.jsonl")
    line = '{"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]}\n'
    path.write_text(line * 4)
    return path


@pytest.fixture
def sft_config(tiny_model, talks, tmp_path):
    """Writes the configuration of a short run; its file."""

    def write(max_steps):
        content = {
            "model": {"class_path": "LitSFT", "init_args": {"policy": {"path": str(tiny_model)}}},
            "data": {"class_path": "SFTDataModule", "init_args": {"train": str(talks), "batch_size": 2}},
            "trainer": {"max_steps": max_steps, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        }
        config = tmp_path / "sft.yaml"
        config.write_text(yaml.safe_dump(content))
        return config

    return write
