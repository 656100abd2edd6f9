import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lit_align.cli.training as training
from lit_align import runs
from lit_align.callbacks import run_folder
from lit_align.cli.resume import check_checkpoint
from lit_align.cli.training import AlignCLI


def weights(run_dir):
    newest = max(Path(run_dir, "checkpoints").glob("step*.ckpt"))
    return torch.load(newest, weights_only=True)["state_dict"]


def rows(run_dir):
    with Path(run_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_config_checkpoints_metrics_and_results_in_a_folder_of_its_own(cli, config):
    assert cli("fit", "--config", config())[0] == 0
    (folder,) = [path for path in Path("runs/toy").iterdir() if not path.is_symlink()]
    assert Path("runs/toy/latest").resolve() == folder.resolve()
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "results.json",
    ]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["last.ckpt", "step000002.ckpt", "step000004.ckpt"]
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 4 and results["stage"] == "LitToy" and results["versions"]["torch"] == torch.__version__
    assert results["metrics"]["val/loss"] == float(rows(folder)[-1]["val/loss"] or rows(folder)[-2]["val/loss"])


def test_the_saved_config_runs_again_and_gives_the_same_weights(cli, config):
    cli("fit", "--config", config(), "--run_dir", "a", "--model.loss.beta=0.7")
    assert cli("fit", "--config", "a/config.yaml", "--run_dir", "b")[0] == 0
    first, second = weights("a"), weights("b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_run_without_run_dir_gets_a_new_folder_and_latest_points_at_the_newest(cli, config):
    for _ in range(2):
        cli("fit", "--config", config())
    folders = sorted(path.name for path in Path("runs/toy").iterdir() if not path.is_symlink())
    assert len(folders) == 2
    assert Path("runs/toy/latest").resolve().name == folders[-1]


def test_a_job_that_starts_again_goes_on_if_it_was_asked_to_and_is_refused_if_not(cli, config, monkeypatch):
    job, other = Path("runs/toy/7.0"), Path("runs/toy/other")
    monkeypatch.setattr(runs, "_job_id", lambda: job.name)
    assert cli("fit", "--config", config())[0] == 0
    assert cli("fit", "--config", config(), "--run_dir", other)[0] == 0  # the newest of the stage
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    status, _, err = cli("fit", "--config", config())
    assert status == 2 and "holds a run (step000004.ckpt); go on with it (--resume true)" in " ".join(err.split())
    status, out, _ = cli("fit", "--config", config(), "--resume=true")
    assert status == 0 and f"{job} has finished (4 optimizer steps): there is nothing to do" in out
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before
    assert cli("fit", "--config", config(), "--resume=true", "--trainer.max_epochs=3")[0] == 0
    assert json.loads((job / "results.json").read_text())["steps"] == 6
    assert json.loads((other / "results.json").read_text())["steps"] == 4


@pytest.mark.parametrize("text", ['{"steps": 4, "epo', '{"metrics": {}}', "[]"])
def test_half_of_a_results_file_is_none(cli, config, text):
    assert cli("fit", "--config", config(), "--run_dir", "r")[0] == 0
    Path("r/results.json").write_text(text)
    assert cli("fit", "--config", config(), "--run_dir", "r", "--resume=true", "--trainer.max_epochs=3")[0] == 0
    assert json.loads(Path("r/results.json").read_text())["steps"] == 6


def test_a_kill_while_results_are_written_leaves_no_half_of_them(tmp_path, monkeypatch):
    path, whole = tmp_path / "results.json", Path.write_text
    run_folder._write_json(path, {"steps": 1})

    def half(self, text, **kwargs):
        whole(self, text[: len(text) // 2], **kwargs)
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "write_text", half)
        run_folder._write_json(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}
    run_folder._write_json(path, {"steps": 3})
    assert json.loads(path.read_text()) == {"steps": 3} and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["bestmodel.ckpt", "last-epoch.ckpt", "hpc", "registry:some/model", "registry"])
def test_a_file_whose_name_begins_like_a_word_of_lightning_is_checked(name, tmp_path):
    if not name.endswith(".ckpt"):
        check_checkpoint(name)
        return
    with pytest.raises(ValueError, match=f"ckpt_path: there is no {name}"):
        check_checkpoint(name)


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_stopped(cli, config):
    cli("fit", "--config", config(), "--run_dir", "whole", "--trainer.max_epochs=4")
    cli("fit", "--config", config(), "--run_dir", "parts")
    assert cli("fit", "--config", config(), "--run_dir", "parts", "--ckpt_path=last", "--trainer.max_epochs=4")[0] == 0
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resuming_keeps_the_earlier_metrics(cli, config):
    cli("fit", "--config", config(), "--run_dir", "r")
    before = Path("r/metrics.csv").read_text()
    cli("fit", "--config", config(), "--run_dir", "r", "--ckpt_path=last", "--trainer.max_epochs=3")
    assert Path("r/metrics-1.csv").read_text() == before
    assert rows("r") and rows("r")[0]["step"] == "4"


def test_ckpt_path_last_without_run_dir_continues_the_newest_run_in_its_folder(cli, config):
    cli("fit", "--config", config())
    assert cli("fit", "--config", config(), "--ckpt_path=last", "--trainer.max_epochs=3")[0] == 0
    (folder,) = [path for path in Path("runs/toy").iterdir() if not path.is_symlink()]
    assert json.loads((folder / "results.json").read_text())["steps"] == 6


def test_validate_test_and_predict_leave_latest_alone_and_write_their_results(cli, config):
    cli("fit", "--config", config(), "--run_dir", "r")
    for command in ("validate", "test"):
        status, _, _ = cli(command, "--config", config(), "--run_dir", "r", "--ckpt_path=last")
        assert status == 0
        assert "val/loss" in json.loads(Path(f"r/{command}.json").read_text())["metrics"]
    assert cli("predict", "--config", config(), "--run_dir", "r", "--ckpt_path=last")[0] == 0
    predicted = [json.loads(line) for line in Path("r/predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in predicted] == [0, 1]
    cli("validate", "--config", config())
    assert not Path("runs/toy").exists() and len(list(Path("runs/toy-validate").iterdir())) == 1


def test_overlays_and_the_command_line_override_in_order(cli, config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {loss: {init_args: {beta: 0.3}}}}\ntrainer: {max_epochs: 1}\n")
    cli("fit", "--config", config(), "--config", overlay, "--run_dir", "r", "--model.policy.dropout=0.25")
    saved = yaml.safe_load(Path("r/config.yaml").read_text())
    init_args = saved["model"]["init_args"]
    assert init_args["loss"]["init_args"]["beta"] == 0.3
    assert init_args["policy"]["dropout"] == 0.25
    assert saved["trainer"]["max_epochs"] == 1


def test_short_class_names_choose_model_data_and_nested_classes(cli):
    args = ("--model", "LitToy", "--data", "ToyData", "--data.path=x", "--model.loss=ToyHinge", "--model.loss.margin=2")
    assert cli("fit", *args, "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--run_dir=r")[0] == 0
    saved = yaml.safe_load(Path("r/config.yaml").read_text())
    assert saved["model"]["class_path"] == "toy_align.LitToy"
    assert saved["model"]["init_args"]["loss"] == {
        "class_path": "toy_align.ToyHinge",
        "init_args": {"beta": 0.1, "margin": 2.0},
    }


def test_print_config_prints_yaml_and_runs_nothing(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        training.run(["fit", "--config", config(), "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["path"] == "x"
    assert not Path("runs").exists()


def test_the_data_module_gets_the_models_tokenizer_unless_it_has_its_own(cli, config):
    cli("fit", "--config", config(), "--run_dir=a")
    cli("fit", "--config", config({"model.init_args.policy.tokenizer": "other"}), "--run_dir=b")
    cli("fit", "--config", config(), "--run_dir=c", "--data.tokenizer=own")
    tokenizers = [
        yaml.safe_load(Path(f"{name}/config.yaml").read_text())["data"]["init_args"]["tokenizer"] for name in "abc"
    ]
    assert tokenizers == ["some/model", "other", "own"]


def test_a_sweeps_none_is_null(cli, config):
    assert cli("fit", "--config", config(), "--run_dir=r", "--data.tokenizer=None", "--trainer.max_time=None")[0] == 0
    assert yaml.safe_load(Path("r/config.yaml").read_text())["trainer"]["max_time"] is None


def test_without_a_logger_there_are_no_metrics_but_everything_else(cli, config):
    assert cli("fit", "--config", config({"trainer.logger": False}), "--run_dir=r")[0] == 0
    assert not Path("r/metrics.csv").exists() and Path("r/results.json").exists()


def test_fast_dev_run_leaves_nothing_behind(cli, config):
    assert cli("fit", "--config", config(), "--trainer.fast_dev_run=true")[0] == 0
    assert not [path for path in Path("runs").rglob("*") if path.is_file() or path.is_symlink()]


def test_a_users_own_checkpoint_callback_writes_to_the_run_folder_too(cli, config):
    own = {"class_path": "ModelCheckpoint", "init_args": {"filename": "mine", "save_top_k": 1}}
    assert cli("fit", "--config", config({"trainer.callbacks": [own]}), "--run_dir=r")[0] == 0
    written = sorted(path.name for path in Path("r/checkpoints").iterdir())
    assert written == ["last.ckpt", "mine.ckpt", "step000002.ckpt", "step000004.ckpt"]


def test_wandb_gets_the_whole_configuration_and_writes_into_the_run_folder(cli, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = {}

    from wandb.sdk.wandb_config import Config

    update = Config.update

    def spy(self, d, allow_val_change=None):
        seen.update(d if isinstance(d, dict) else {})
        return update(self, d, allow_val_change)

    monkeypatch.setattr(Config, "update", spy)
    logger = {"class_path": "WandbLogger", "init_args": {"project": "p", "offline": True}}
    assert cli("fit", "--config", config({"trainer.logger": logger}), "--run_dir=r")[0] == 0
    assert seen["model"]["init_args"]["policy"]["path"] == "some/model"
    assert seen["trainer"]["max_epochs"] == 2
    assert list(Path("r/wandb").glob("offline-run-*/files/lit_config.yaml"))
    assert rows("r"), "the CSV log is written beside W&B"


def test_sigterm_ends_with_143(monkeypatch):
    def stopped(*args):
        raise SIGTERMException

    monkeypatch.setattr(training, "AlignCLI", stopped)
    assert training.run(["fit"]) == 143


class _PlainCLI(LightningCLI):
    pass


@pytest.mark.parametrize("cli_class, expected", [(_PlainCLI, 0.2), (AlignCLI, 0.9)])
def test_the_command_line_wins_over_hyperparameters_in_a_checkpoint(cli, config, cli_class, expected):
    """Lightning lets the checkpoint win. When that row fails, `AlignCLI._parse_ckpt_path` is no longer needed."""
    cli("fit", "--config", config(), "--model.loss.beta=0.2", "--run_dir=r")
    path = next(Path("r/checkpoints").glob("step000004.ckpt"))
    args = ["fit", "--config", config(), "--model.loss.beta=0.9", f"--ckpt_path={path}", "--trainer.logger=false"]
    if cli_class is AlignCLI:
        done = AlignCLI(args)
    else:
        kwargs = dict(subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False)
        done = _PlainCLI(LightningModule, LightningDataModule, args=args, save_config_callback=None, **kwargs)
    assert done.model.loss.beta == expected
