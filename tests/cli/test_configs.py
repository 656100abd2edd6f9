"""Every shipped configuration is one that the command line takes."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lit_align.__main__ import main
from lit_align.cli.plugins import import_classes
from lit_align.cli.training import AlignCLI

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
STAGES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "pipeline")
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "trainer").glob("*.yaml"))
BASES = sorted((CONFIGS / "model").glob("*.yaml"))


class ParsedOnly(AlignCLI):
    """Stops where tokenizer and folders have been settled."""

    def _settle_run_dir(self, config):
        return Path("unused")

    def instantiate_classes(self):
        return None

    def _run_subcommand(self, subcommand):
        return None


def parsed(*files):
    args = [part for file in files for part in ("--config", str(file))]
    return ParsedOnly(["fit", *args], import_classes()).config["fit"]


def test_there_is_a_configuration_for_every_stage():
    assert {path.stem for path in STAGES} == {"pt", "sft", "rm", "dpo", "ppo"}
    assert {path.stem for path in OVERLAYS} >= {"cpu", "gpu", "ddp"}


def test_no_configuration_lies_where_no_test_looks():
    known = {*STAGES, *RECIPES, *OVERLAYS, *BASES, CONFIGS / "pipeline.yaml", *(CONFIGS / "sweeps").glob("*.yaml")}
    assert set(CONFIGS.rglob("*")) - known - {path for path in CONFIGS.rglob("*") if path.is_dir()} == set()


@pytest.mark.parametrize("path", [*STAGES, *RECIPES], ids=lambda path: path.stem)
def test_it_is_accepted_and_every_data_module_in_it_gets_a_tokenizer(path):
    config = parsed(path)
    assert config["data"]["init_args"]["tokenizer"] is not None
    judges = [c for c in config["trainer"]["callbacks"] or [] if c["class_path"].endswith("JudgeAnswers")]
    assert all(c["init_args"]["prompts"]["init_args"]["tokenizer"] is not None for c in judges)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_changes_the_trainer_and_nothing_else(path):
    overlay = yaml.safe_load(path.read_text())
    assert set(overlay) == {"trainer"}
    config, plain = parsed(CONFIGS / "dpo.yaml", path), parsed(CONFIGS / "dpo.yaml")
    for key, value in overlay["trainer"].items():
        assert config["trainer"][key] == value
    assert config["model"] == plain["model"] and config["data"] == plain["data"]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_an_overlay_of_the_base_changes_the_source_of_what_is_trained_and_nothing_else(stage):
    assert [path.stem for path in BASES] == ["qlora", "qlora_rm"]
    path, role = BASES[stage == "rm"], "reward_model" if stage == "rm" else "policy"
    config, plain = parsed(CONFIGS / f"{stage}.yaml", path), parsed(CONFIGS / f"{stage}.yaml")
    source, before = config["model"]["init_args"].pop(role), plain["model"]["init_args"].pop(role)
    assert all(config[part] == plain[part] for part in ("model", "data", "trainer"))
    assert (source["quantization"], source["lora"]["r"], source["lora"]["alpha"]) == ("nf4", 16, 32)
    changed = {key for key, value in vars(source).items() if value != before[key]}
    assert changed == {"quantization", "lora"}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_what_it_names_is_there(path):
    """Recipes are left out: they name what `make smollm` and a user's own data bring."""
    text = yaml.safe_load(path.read_text())
    named = [v for v in _strings(text) if v.startswith("datamodules/")]
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def _strings(node):
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return [text for item in node for text in _strings(item)]
    return [node] if isinstance(node, str) else []


SMALL = (
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--data.batch_size=2",
)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_it_runs_for_a_step_and_exports_what_it_trained(path, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    judges = "JudgeAnswers" in path.read_text()
    small = (*SMALL, "--trainer.callbacks.max_prompts=2", "--trainer.callbacks.max_new_tokens=2") if judges else SMALL
    cache = f"--data.cache_dir={tmp_path / 'cache'}"
    assert main(["fit", "--config", str(path), f"--run_dir={tmp_path / 'run'}", cache, *small]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
    assert (tmp_path / "run" / "samples.jsonl").is_file() == judges


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_base_in_4_bits_trains_a_step_and_is_exported_whole(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    overlay = BASES[stage == "rm"]
    options = [f"--run_dir={tmp_path / 'run'}", f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.callbacks=null"]
    assert main(["fit", "--config", str(CONFIGS / f"{stage}.yaml"), "--config", str(overlay), *options, *SMALL]) == 0
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(".lora_" in name or ".modules_to_save." in name for name in state)
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "again")]) == 0
    first, second = (tmp_path / f / "model.safetensors" for f in ("run/hf", "again"))
    assert first.read_bytes() == second.read_bytes()


RECORDS = {
    "pt": "pretrain/fever.txt",
    "sft": "sft/medical_sft.jsonl",
    "rm": "preference/dpo_zh.jsonl",
    "dpo": "preference/dpo_zh.jsonl",
    "ppo": "prompts/medical_qa.jsonl",
}


@pytest.mark.real_data
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_for_a_step_on_real_records(path, tmp_path, monkeypatch, shared_data, tiny_model):
    monkeypatch.chdir(REPOSITORY)
    stage = path.stem.split("_")[1]
    role = "reward_model" if stage == "rm" else "policy"
    options = [
        f"--model.{role}.path={tiny_model}",
        f"--data.train={shared_data / RECORDS[stage]}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--run_dir={tmp_path / 'run'}",
    ]
    assert main(["fit", "--config", str(path), *options, *SMALL]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 1
