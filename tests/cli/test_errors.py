from pathlib import Path

import pytest

from lit_align.cli.errors import message_for_user


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--model.polcy.path=3"], ["the command line, model.polcy", "LitToy takes no option 'polcy'", "'policy'"]),
        (["--model.policy.pth=3"], ["model.policy.pth", "ToySource takes no option 'pth'", "did you mean 'path'?"]),
        (
            ["--model.loss=ToyHinge", "--model.loss.betta=1"],
            ["model.loss.betta", "'beta'", "ToyHinge takes: beta, margin"],
        ),
        (["--model.loss.beta=abc"], ["the command line, model.loss.beta", "expected float, got abc"]),
        (["--model.loss=NoSuchLoss"], ["model.loss", "there is no class NoSuchLoss"]),
        (["--trainer.max_step=3"], ["no option trainer.max_step", "did you mean trainer.max_steps?"]),
        (["--trainer.max_stepz=3"], ["no option trainer.max_stepz", "did you mean trainer.max_steps?"]),
        (["--trainer.max_steps=many"], ["trainer.max_steps", "expected int, got many"]),
        (["--modle.loss.beta=1"], ["the command takes no option 'modle'", "did you mean 'model'?"]),
        (["--config=toyy.yaml"], ["no file toyy.yaml", "did you mean toy.yaml?"]),
        (
            ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lrr=1"],
            ["model.optimizer.lrr", "AdamW takes no option 'lrr'", "did you mean 'lr'?"],
        ),
    ],
)
def test_a_wrong_option_is_named_with_the_closest_right_one(cli, config, args, expected):
    status, out, err = cli("fit", "--config", config(), *args)
    assert status == 2 and out == ""
    assert [part for part in expected if part not in err] == []
    assert len(err.splitlines()) <= 4


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("policy:", "polcy:", ["bad.yaml:4, model.polcy", "did you mean 'policy'?"]),
        ("path: some/model", "pth: some/model", ["bad.yaml:5, model.policy.pth", "did you mean 'path'?"]),
        ("max_epochs: 2", "max_epoch: 2", ["bad.yaml:11, trainer.max_epoch", "did you mean trainer.max_epochs?"]),
        ("trainer:", "trainr:", ["bad.yaml:10, trainr", "did you mean 'trainer'?"]),
        ("class_path: LitToy", "class_path: LitTooy", ["bad.yaml:1, model", "there is no class LitTooy"]),
        ("path: x", "batch_size: x", ["bad.yaml:9, data.batch_size", "expected int, got x"]),
        ("path: x", "batch_size: 4", ["data.path", "path must be given for ToyData", "--data.path=..."]),
        ("policy:", "policy: [", ["bad.yaml:", "not YAML"]),
    ],
)
def test_a_wrong_key_in_a_file_is_named_with_file_and_line(cli, config, old, new, expected):
    text = Path(config(name="bad.yaml")).read_text()
    assert old in text
    Path("bad.yaml").write_text(text.replace(old, new, 1))
    status, out, err = cli("fit", "--config", "bad.yaml")
    assert status == 2 and out == ""
    assert [part for part in expected if part not in err] == []
    assert len(err.splitlines()) <= 4


def test_a_missing_model_is_a_configuration_error(cli):
    status, _, err = cli("fit", "--data", "ToyData", "--data.path=x")
    assert status == 2 and "model must be given" in err


def test_a_checkpoint_that_is_not_there_is_named(cli, config):
    status, _, err = cli("fit", "--config", config(), "--ckpt_path=last", "--run_dir=nowhere")
    assert status == 2 and "nowhere/checkpoints" in err.replace("\\", "/")
    status, _, err = cli("fit", "--config", config(), "--ckpt_path=last")
    assert status == 2 and "no run of stage toy" in err
    assert not Path("runs").exists() and not Path("nowhere").exists()


@pytest.mark.parametrize("option", ["--trainer.strategy=nonsense", "--trainer.devices=0", "--trainer.max_steps=-5"])
def test_what_lightning_finds_wrong_with_the_trainer_is_one_message(cli, config, option):
    status, _, err = cli("fit", "--config", config(), option)
    assert status == 2 and err.splitlines()[-2].startswith("lit-align: ")


def test_an_error_that_data_raise_on_purpose_is_a_message_and_exit_status_1(cli, config, monkeypatch):
    import toy_align

    namespace = {"__name__": "datamodules.toy"}
    exec("def setup(self, stage):\n    raise ValueError('a.jsonl:3: question: expected text, got 5')", namespace)
    monkeypatch.setattr(toy_align.ToyData, "setup", namespace["setup"])
    status, _, err = cli("fit", "--config", config())
    assert status == 1
    assert err.splitlines()[-2] == "lit-align: a.jsonl:3: question: expected text, got 5"
    monkeypatch.setenv("LIT_ALIGN_DEBUG", "1")
    with pytest.raises(ValueError, match="expected text"):
        cli("fit", "--config", config())


def test_a_bug_keeps_its_traceback(cli, config):
    with pytest.raises(ValueError, match="invalid literal"):
        cli("fit", "--config", config({"data.init_args.path": "a bug"}))
    with pytest.raises(ValueError, match="not a number"):
        cli("fit", "--config", config(), "--model.loss=ToyHinge", "--model.loss.margin=-1")


def test_a_run_that_cannot_be_built_leaves_no_folder(cli, config):
    with pytest.raises(ValueError):
        cli("fit", "--config", config(), "--model.loss=ToyHinge", "--model.loss.margin=-1")
    assert not [path for path in Path("runs").rglob("*") if path.name != "toy"]


def _raised(source, module):
    try:
        exec(source, {"__name__": module})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "source, module, expected",
    [
        ("raise ValueError('meant')", "lit_align.anything", "meant"),
        ("raise FileNotFoundError('gone')", "datamodules.anything", "gone"),
        ("try:\n    int('x')\nexcept ValueError as e:\n    raise ValueError('meant') from e", "lit_align.a", "meant"),
        ("raise ValueError('not ours')", "numpy.core", None),
        ("int('x')", "lit_align.anything", None),
        ("a, b = 1, 2, 3", "lit_align.anything", None),
        ("raise TypeError('a bug')", "lit_align.anything", None),
        ("assert False, 'an invariant'", "lit_align.anything", None),
    ],
)
def test_only_errors_raised_on_purpose_are_messages(source, module, expected):
    assert message_for_user(_raised(source, module), ("lit_align", "datamodules")) == expected


def test_an_error_that_another_library_wrapped_is_found_by_its_cause():
    try:
        try:
            exec("raise ValueError('meant')", {"__name__": "lit_align.anything"})
        except ValueError as error:
            raise ValueError("wrapped in a page of text") from error
    except ValueError as wrapped:
        assert message_for_user(wrapped, ("lit_align",)) == "meant"
