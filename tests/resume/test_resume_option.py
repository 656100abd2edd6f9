"""`--resume true`: begins, goes on, leaves what is over; what has changed is refused with the difference named."""

import pytest
import torch
from transformers import AutoTokenizer

from lit_align import runs
from lit_align.__main__ import main

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


def test_a_run_that_is_over_stays_as_it_is(fit, tmp_path):
    fit("--trainer.max_steps=2")
    weights = (tmp_path / "run" / "hf" / "model.safetensors").read_bytes()
    assert fit("--trainer.max_steps=2")[0] == 0
    assert steps(tmp_path) == 2 and (tmp_path / "run" / "hf" / "model.safetensors").read_bytes() == weights


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
        f"--data.tokenizer={other_tokenizer}": "data.tokenizer: the tokenizer is not what the run began with",
        "--model.reward_model.lora.r=4": "reward_model.lora: it was None, now it is",
    }
    for option, words in changes.items():
        status, err = fit(option, "--trainer.max_steps=3")
        assert status == 1 and words in err and "Traceback" not in err
