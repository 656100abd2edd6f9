"""Toys on the import path, a directory of its own for every test, and the command line as a function."""

import sys
from pathlib import Path

import pytest
import yaml

from lit_align.__main__ import main

TOY = Path(__file__).parent / "toy"


@pytest.fixture(autouse=True)
def _toys(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)
    for name in ("LIT_ALIGN_RUN_DIR", "LIT_ALIGN_DEBUG", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    import toy_align  # noqa: F401  (short class names work for what is imported)

    yield
    sys.modules.pop("toy_plugin", None)


@pytest.fixture
def config(tmp_path):
    """Writes a configuration of the toy stage, with changes given as {"dotted.key": value}."""

    def write(changes=None, name="toy.yaml"):
        content = {
            "model": {"class_path": "LitToy", "init_args": {"policy": {"path": "some/model"}}},
            "data": {"class_path": "ToyData", "init_args": {"path": "x"}},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        }
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            node = content
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def cli(capsys):
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def run(*args):
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        done = capsys.readouterr()
        return status, done.out, done.err

    return run
