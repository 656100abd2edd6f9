"""Code that comes with a model, a tokenizer, a dataset or a checkpoint runs only where its user asked by name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from datamodules import SFTDataModule
from datamodules.tokenizer import load_tokenizer as data_tokenizer
from lit_align.models.checkpoint import checkpoint_entry, read_checkpoint, rebuild, restore_tokenizer, whole_copy
from lit_align.models.export import export
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.meta import meta_network
from lit_align.models.source import ModelSource
from lit_align.models.tokens import load_tokenizer

MODEL = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.makedirs({mark!r}, exist_ok=True)
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""
TOKENIZER = """
import os
from transformers import PreTrainedTokenizerFast
os.makedirs({mark!r}, exist_ok=True)
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def model_with_code(tiny_model, tmp_path, mark):
    folder = tmp_path / f"model_{tmp_path.name}"
    shutil.copytree(tiny_model, folder)
    (folder / "evil_model.py").write_text(MODEL.format(mark=str(mark)))
    auto_map = {"AutoConfig": "evil_model.EvilConfig", "AutoModelForCausalLM": "evil_model.EvilModel"}
    changed(folder / "config.json", auto_map=auto_map, model_type="evil", architectures=["EvilModel"])
    return folder


@pytest.fixture
def tokenizer_with_code(tiny_model, tmp_path, mark):
    folder = tmp_path / f"tokenizer_{tmp_path.name}"
    shutil.copytree(tiny_model, folder)
    (folder / "evil_tokenizer.py").write_text(TOKENIZER.format(mark=str(mark)))
    auto_map = {"AutoTokenizer": [None, "evil_tokenizer.EvilTokenizer"]}
    changed(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")
    return folder


@pytest.fixture(autouse=True)
def _own_modules(tmp_path, monkeypatch):
    """Where transformers copies the code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_a_model_s_code_is_not_run(load, model_with_code, tiny_model, mark):
    source = ModelSource(path=str(model_with_code), tokenizer=str(tiny_model))
    with pytest.raises(ValueError, match=r"model\.(path|tokenizer): cannot load .*"):
        load(source)
    assert not mark.exists()


def test_a_model_s_code_is_run_where_that_was_asked_for(model_with_code, tiny_model, mark):
    source = ModelSource(path=str(model_with_code), tokenizer=str(tiny_model), trust_remote_code=True)
    assert type(load_causal_lm(source)).__name__ == "EvilModel" and mark.exists()


def test_a_plan_runs_a_model_s_code_where_that_was_asked_for_alone(model_with_code, tiny_model, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    source = ModelSource(path=str(model_with_code), tokenizer=str(tiny_model))
    with pytest.raises(ValueError, match=r"model\.path: cannot read a configuration of .*"):
        meta_network(source, "causal")
    assert not mark.exists()
    assert type(meta_network(replace(source, trust_remote_code=True), "causal")).__name__ == "EvilModel"


def test_a_tokenizer_s_code_is_not_run(tokenizer_with_code, mark):
    with pytest.raises(ValueError, match=r"policy\.tokenizer: cannot load a tokenizer from"):
        load_tokenizer(ModelSource(path=str(tokenizer_with_code)), "policy")
    with pytest.raises(ValueError, match="it cannot be loaded"):
        data_tokenizer(str(tokenizer_with_code), "SFTDataModule")
    assert not mark.exists()


def test_a_tokenizer_s_code_is_run_where_that_was_asked_for(tokenizer_with_code, mark):
    load_tokenizer(ModelSource(path=str(tokenizer_with_code), trust_remote_code=True))
    assert mark.exists()


@pytest.mark.parametrize("whole", [False, True], ids=["as_a_folder", "as_a_dataset"])
def test_a_dataset_s_script_is_not_run(whole, talks, tiny_model, tmp_path, mark):
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copy(talks, folder / "talks.jsonl")
    (folder / "corpus.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    source = {"path": str(folder), "split": "train"} if whole else str(folder)
    data = SFTDataModule(train=source, tokenizer=str(tiny_model), batch_size=2)
    try:
        data.prepare_data()
        data.setup("fit")
    except ValueError as error:
        assert "corpus" in str(error)
    assert not mark.exists()
    with pytest.raises(ValueError, match="unknown field 'trust_remote_code'"):
        SFTDataModule(
            train={"path": str(folder), "trust_remote_code": True}, tokenizer=str(tiny_model), batch_size=2
        ).setup("fit")


# -- what a checkpoint says of itself


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """Writes a checkpoint whose entry was changed."""

    def write(change):
        source = ModelSource(path=str(tiny_model))
        model = load_causal_lm(source)
        entry = checkpoint_entry("sft", {"policy": (source, model)}, load_tokenizer(source))
        change(entry)
        state = {f"policy.{name}": value for name, value in model.state_dict().items()}
        torch.save({"lit_align": entry, "state_dict": state}, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return write


def test_a_checkpoint_cannot_trust_code_in_its_user_s_name(checkpoint, model_with_code, tmp_path, mark):
    def change(entry):
        entry["roles"]["policy"]["source"] |= {"path": str(model_with_code), "trust_remote_code": True}

    path = checkpoint(change)
    with pytest.raises(ValueError, match=r"policy: it was trained with Python code .* pass trust_remote_code=true if"):
        export(str(path), str(tmp_path / "out"))
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert type(rebuild(*read_checkpoint(path), "policy", trust_remote_code=True)).__name__ == "EvilModel"
    assert mark.exists()


def test_a_sharded_run_that_was_trusted_can_export_at_its_end(group, model_with_code, tiny_model):
    source = ModelSource(path=str(model_with_code), tokenizer=str(tiny_model), trust_remote_code=True)
    model = load_causal_lm(source)
    copy = whole_copy(source, model)
    assert type(copy).__name__ == "EvilModel" and copy is not model
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in model.state_dict().items())


def as_bytes(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def test_a_checkpoint_s_tokenizer_runs_no_code(checkpoint, tokenizer_with_code, mark):
    def change(entry):
        for name in ("evil_tokenizer.py", "tokenizer_config.json"):
            entry["tokenizer"][name] = as_bytes((tokenizer_with_code / name).read_text())

    entry, _ = read_checkpoint(checkpoint(change))
    with pytest.raises(ValueError):
        restore_tokenizer(entry)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["../outside.txt", "{root}/outside.txt", "sub/../../outside.txt", ".."])
def test_a_checkpoint_s_tokenizer_writes_nothing_elsewhere(place, checkpoint, tmp_path):
    name = place.format(root=tmp_path)
    entry, _ = read_checkpoint(checkpoint(lambda entry: entry["tokenizer"].update({name: as_bytes("x")})))
    with pytest.raises(ValueError, match="expected a name without a folder"):
        restore_tokenizer(entry)
    assert not list(tmp_path.rglob("outside.txt"))
