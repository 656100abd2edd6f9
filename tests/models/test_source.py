"""What a user may write about a model, and what is said when it cannot be meant so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lit_align.models.source import LoraSettings, ModelSource


def test_a_source_survives_its_dictionary_which_is_plain_json() -> None:
    source = ModelSource(path="a/b", dtype="bfloat16", lora=LoraSettings(r=4, target_modules=["q_proj"]))
    assert ModelSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    assert ModelSource.from_dict(ModelSource(path="a/b").to_dict()) == ModelSource(path="a/b")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ModelSource(), r"policy: give either path .* or config .*; got neither"),
        (ModelSource(path="a", config={"model_type": "llama"}), r"policy: .*; got both"),
        (ModelSource(path="a", dtype="fp32"), r"policy\.dtype: expected one of float32, .*; got 'fp32'"),
        (ModelSource(config={"hidden_size": 8}, tokenizer="t"), r"policy\.config: model_type is missing"),
        (ModelSource(config={"model_type": "llama"}), r"policy\.tokenizer: a model from config needs a tokenizer"),
        (ModelSource(config={"model_type": "llama"}, tokenizer="t", gguf_file="x"), r"policy\.gguf_file"),
        (ModelSource(path="a", lora=LoraSettings(r=0)), r"policy\.lora: expected r >= 1 .*got r=0"),
        (ModelSource(path="a", lora=LoraSettings(dropout=1.0)), r"policy\.lora: .*dropout=1\.0"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_by_name(source: ModelSource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source.validate("policy")


def test_a_gguf_file_that_is_not_there_is_named_beside_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "there.gguf").touch()
    with pytest.raises(ValueError, match=r"no x\.gguf in .*there\.gguf"):
        ModelSource(path=str(tmp_path), gguf_file="x.gguf").validate()


def test_a_checkpoint_given_as_a_model_leads_to_the_export_command(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"expected a folder.*last\.ckpt; turn it into a folder with the export"):
        ModelSource(path=str(tmp_path / "last.ckpt")).validate()


def test_a_gguf_path_is_folder_and_file() -> None:
    assert ModelSource(path="models/x.gguf").location == ("models", "x.gguf")
    assert ModelSource(path="models", gguf_file="x.gguf").tokenizer_location == ("models", "x.gguf")
    assert ModelSource(path="models/x.gguf", tokenizer="t").tokenizer_location == ("t", None)


def test_sources_parse_from_the_command_line_with_help_for_every_field() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=ModelSource)
    given = ["--policy.path=x", "--policy.lora.r=4", '--policy.lora.target_modules=["q_proj"]']
    source = parser.instantiate(parser.parse_args(given)).policy
    assert source == ModelSource(path="x", lora=LoraSettings(r=4, target_modules=["q_proj"]))
    given = ["--policy.config.model_type=llama", "--policy.config.hidden_size=8", "--policy.tokenizer=t"]
    source = parser.instantiate(parser.parse_args(given)).policy
    assert source == ModelSource(config={"model_type": "llama", "hidden_size": 8}, tokenizer="t")
    text = " ".join(parser.format_help().split())
    assert "Train low-rank adapters on the frozen model" in text
    assert "Run Python code that comes with the model" in text
