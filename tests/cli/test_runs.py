import os
from pathlib import Path

import pytest

from lit_align import runs


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "NODE_RANK",
        "SLURM_PROCID",
        "WORLD_SIZE",
        "SLURM_NTASKS",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(runs.VARIABLE, raising=False)


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    folders = {runs.choose_run_dir(tmp_path, "dpo") for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() and folder.parent.name == "dpo" for folder in folders)


def test_a_rank_that_the_first_process_started_uses_its_folder(tmp_path, monkeypatch):
    folder = runs.choose_run_dir(tmp_path, "sft")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.choose_run_dir(tmp_path, "sft") == folder


def test_ranks_of_a_job_share_the_folder_of_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    found = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv(runs.VARIABLE, raising=False)
        found.append(runs.choose_run_dir(tmp_path, "sft"))
    assert found == [tmp_path / "sft" / "job7"] * 2


def test_a_job_s_earlier_start_is_one_that_left_a_checkpoint(tmp_path, monkeypatch):
    assert runs.job_run(tmp_path, "sft") is None, "no job"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    folder = runs.choose_run_dir(tmp_path, "sft")
    assert runs.job_run(tmp_path, "sft") is None, "the folder of another rank of this start"
    _checkpoint(folder, "step000001.ckpt", 0)
    assert runs.job_run(tmp_path, "sft") == folder
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.job_run(tmp_path, "sft") is None, "started by a process whose folder it is told"


def test_a_rank_that_knows_nothing_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not runs.choose_run_dir(tmp_path, "sft").exists()
    runs.link_latest(tmp_path / "sft" / "x")
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("told, first", [({"NODE_RANK": "1"}, False), ({"NODE_RANK": "1", "RANK": "0"}, True)])
def test_another_host_s_first_process_is_not_the_first(told, first, tmp_path, monkeypatch):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "metrics.csv").touch()
    runs.set_aside(tmp_path / "metrics.csv")
    assert (tmp_path / "metrics-1.csv").exists() == runs.choose_run_dir(tmp_path, "sft").exists() == first


def test_latest_is_a_relative_link_that_moves(tmp_path):
    for _ in range(2):
        folder = runs.choose_run_dir(tmp_path, "sft")
        runs.link_latest(folder)
    assert os.readlink(tmp_path / "sft" / "latest") == folder.name
    assert runs.latest_run(tmp_path, "sft") == folder


def test_no_run_is_an_error_that_names_the_stage(tmp_path):
    with pytest.raises(ValueError, match="no run of stage dpo"):
        runs.latest_run(tmp_path, "dpo")


def _checkpoint(run_dir: Path, name: str, age: float, *, whole: bool = True, sharded: bool = False) -> Path:
    path = run_dir / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if sharded:
        path.mkdir()
        for file in (".metadata", "meta.pt")[: 2 if whole else 1]:
            (path / file).touch()
    else:
        path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    _checkpoint(tmp_path, "old.ckpt", 20)
    newest = _checkpoint(tmp_path, "new.ckpt", 10, sharded=True)
    _checkpoint(tmp_path, "half.ckpt", 5, sharded=True, whole=False)
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("old.ckpt")
    assert runs.last_checkpoint(tmp_path) == newest


def test_a_run_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        runs.last_checkpoint(tmp_path)


def test_a_file_is_set_aside_under_the_next_free_name(tmp_path):
    path = tmp_path / "metrics.csv"
    for text in ("one", "two"):
        path.write_text(text)
        runs.set_aside(path)
    assert [(tmp_path / f"metrics-{n}.csv").read_text() for n in (1, 2)] == ["one", "two"]
    runs.set_aside(path)
    assert not path.exists()
