"""`--resume true`: begins, goes on, leaves what is over; what has changed is refused with the difference named."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from lit_align import runs
from lit_align.__main__ import main
from lit_align.checkpoint_io import WholeCheckpointIO

COMMON = (
    "--trainer.callbacks=[]",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--resume=true",
)


@pytest.fixture
def fit(repository, monkeypatch, capsys, tmp_path):
    """Trains the reward model of the repository in the folder "run": (exit status, standard error)."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    for name in ("LIT_ALIGN_RUN_DIR", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*options):
        status = main(["fit", "--config", "configs/rm.yaml", *COMMON, f"--run_dir={tmp_path / 'run'}", *options])
        return status, " ".join(capsys.readouterr().err.split())

    return run


def steps(tmp_path):
    return torch.load(runs.last_checkpoint(tmp_path / "run"), weights_only=True)["global_step"]


def test_the_same_command_begins_a_run_and_goes_on_with_it(fit, tmp_path):
    assert fit("--trainer.max_steps=2")[0] == 0 and steps(tmp_path) == 2
    assert fit("--trainer.max_steps=3")[0] == 0 and steps(tmp_path) == 3


def test_a_user_s_own_weights_do_not_stand_in_the_way(fit, tmp_path):
    own = {"filename": "w-{step}", "save_weights_only": True, "every_n_train_steps": 1, "save_top_k": -1}
    callback = [f"--trainer.callbacks={json.dumps([{'class_path': 'ModelCheckpoint', 'init_args': own}])}"]
    assert fit("--trainer.max_steps=2", *callback)[0] == 0
    (tmp_path / "run/checkpoints/w-step=2.ckpt").rename(tmp_path / "run/checkpoints/w-step=9.ckpt")
    status, err = fit("--trainer.max_steps=3", *callback)
    assert status == 0 and steps(tmp_path) == 3
    assert "w-step=9.ckpt: this checkpoint holds weights alone" in err and "going on from step000002.ckpt" in err


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_is_over_stays_as_it_is(fit, tmp_path, capsys):
    fit("--trainer.max_steps=2")
    before = contents(tmp_path / "run")
    assert fit("--trainer.max_steps=2")[0] == 0
    assert contents(tmp_path / "run") == before


def test_the_link_to_the_last_checkpoint_follows_and_only_two_are_kept(fit, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for steps in (2, 4, 6):
        fit(f"--trainer.max_steps={steps}", "--checkpoint_every=1")
        assert sorted(path.name for path in folder.iterdir()) == [
            "last.ckpt",
            f"step{steps - 1:06d}.ckpt",
            f"step{steps:06d}.ckpt",
        ]
        assert (folder / "last.ckpt").resolve() == folder / f"step{steps:06d}.ckpt"


def test_a_folder_that_holds_a_run_is_not_used_for_another(fit, tmp_path):
    fit("--trainer.max_steps=1")
    before = contents(tmp_path / "run")
    status, err = fit("--trainer.max_steps=1", "--resume=false")
    assert status == 2 and "holds a run (step000001.ckpt); go on with it (--resume true)" in err
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_that_is_not_there_or_cut_is_told_in_a_line(fit, tmp_path):
    status, err = fit("--trainer.max_steps=1", "--ckpt_path=nowhere.ckpt")
    assert status == 2 and "ckpt_path: there is no nowhere.ckpt" in err
    (tmp_path / "cut.ckpt").write_bytes(b"PK not whole")
    status, err = fit("--trainer.max_steps=1", f"--ckpt_path={tmp_path / 'cut.ckpt'}")
    assert status == 2 and "is no checkpoint, or was cut" in err and "Traceback" not in err


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_clock_says(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (20, 10):
        WholeCheckpointIO().save_checkpoint({"n": step}, folder / f"step{step:06d}.ckpt")
    assert runs.last_checkpoint(tmp_path).name == "step000020.ckpt"


def test_without_a_folder_the_newest_run_is_taken_up_unless_it_has_finished(repository, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "datamodules").symlink_to(repository / "datamodules")
    base = ["fit", "--config", str(repository / "configs/rm.yaml"), *COMMON]

    def newest():
        monkeypatch.delenv("LIT_ALIGN_RUN_DIR", raising=False)
        return (tmp_path / "runs" / "rm" / "latest").resolve()

    assert main([*base, "--trainer.max_steps=2"]) == 0
    first = newest()
    (first / "results.json").unlink()  # as if it had been killed
    assert main([*base, "--trainer.max_steps=3"]) == 0 and newest() == first
    assert main([*base, "--trainer.max_steps=3"]) == 0 and newest() != first
    assert f"{first.name} has finished: a new run begins" in capsys.readouterr().out
    second = newest()
    assert main([*base, "--data.train=nowhere.jsonl"]) != 0
    assert newest() == second  # a failed start leaves no folder and takes nothing over
    assert len([path for path in (tmp_path / "runs" / "rm").iterdir() if not path.is_symlink()]) == 2


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory, repository):
    """The reward model's tokenizer with another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(repository / "datamodules/demo/assets/sft")
    tokenizer.chat_template += "\n"
    tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


def test_a_changed_run_is_refused_with_the_difference_named(fit, other_tokenizer):
    fit("--trainer.max_steps=1")
    changes = {
        "--data.batch_size=8": "data.batch_size: the run began with 16, now it is 8",
        "--data.seed=1": "data.seed: the run began with 0, now it is 1",
        "--data.max_length=256": "data.max_length: the run began with 512, now it is 256",
        "--data.train=datamodules/demo/corpus/preference.heldout.jsonl": "data.train: the contents of the files are",
        f"--data.tokenizer={other_tokenizer}": "chat_template.jinja (chat templates are those of data.tokenizer)",
        "--model.reward_model.lora.r=4": "reward_model.lora: it was None, now it is",
    }
    for option, words in changes.items():
        status, err = fit(option, "--trainer.max_steps=3")
        assert status == 1 and words in err and "Traceback" not in err
