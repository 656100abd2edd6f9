from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lit_align.cli.plugins import import_classes
from lit_align.cli.training import AlignCLI

REPOSITORY = Path(__file__).resolve().parents[2]
SWEEPS = sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml"))


class ParsedOnly(AlignCLI):
    """Stops where the configuration has been read."""

    def before_instantiate_classes(self):
        return None

    def instantiate_classes(self):
        return None

    def _run_subcommand(self, subcommand):
        return None


def sample(parameter):
    return parameter["values"][-1] if "values" in parameter else parameter["min"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_command_that_wandb_makes_of_a_sweep_sets_every_parameter(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    sweep = yaml.safe_load(path.read_text())
    trial = {name: sample(parameter) for name, parameter in sweep["parameters"].items()}
    options = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    after_fit = sweep["command"][sweep["command"].index("fit") :]
    args = [part for token in after_fit for part in (options["args"] if token == "${args}" else [token])]
    parsed = ParsedOnly(args, import_classes()).config["fit"]
    assert {name: parsed[name] for name in trial} == trial
    assert parsed["trainer.logger.class_path"].endswith(WandbLogger.__name__)


def test_the_sweeps_are_found():
    assert [path.stem for path in SWEEPS] == ["dpo"]
