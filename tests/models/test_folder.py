"""An export takes the place of a model and of nothing else, and says so before it reads anything."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.__main__ import main
from lit_align.models.export import export_module
from lit_align.models.folder import place_for, whole_folder

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .{other} import NAME
class OwnConfig(LlamaConfig):
    model_type = NAME
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
MODEL = ("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json")


def filled(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def written(out):
    with whole_folder(out) as folder:
        (folder / "config.json").write_text("new")
    return {path.name: path.read_text() for path in out.iterdir()}


@pytest.mark.parametrize(
    "names",
    [
        (*MODEL, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"),
        ("adapter_config.json", "adapter_model.safetensors", "README.md"),
        ("config.json", "additional_chat_templates/rag.jinja"),
        (),
    ],
    ids=["model", "adapter", "templates", "nothing"],
)
def test_a_model_is_replaced(names, tmp_path):
    (tmp_path / "out").mkdir()
    assert written(filled(tmp_path / "out", *names)) == {"config.json": "new"}


@pytest.mark.parametrize(
    "names, told",
    [
        (("config.json", "README.md", "src/thesis.tex"), "src"),
        ((*MODEL, "runs/a.ckpt", "notes.md", "train.py", "x.csv"), r"notes\.md, runs, train\.py and 1 more"),
        (("model.safetensors", "README.md"), r"README\.md, model\.safetensors"),
        ((*MODEL, "pytorch_model.bin"), r"pytorch_model\.bin"),
    ],
)
def test_a_folder_with_anything_else_is_left_alone(names, told, tmp_path):
    out = filled(tmp_path / "out", *names)
    with pytest.raises(ValueError, match=rf"out: .*out holds {told}, and an export replaces only"):
        written(out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(names)


def test_what_appeared_while_a_model_was_written_stays(tmp_path):
    with pytest.raises(ValueError, match="holds diary"), whole_folder(tmp_path / "out"):
        filled(tmp_path / "out", "diary")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "diary"]


def test_the_working_directory_is_refused_and_a_link_followed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    assert written(tmp_path / "link") == {"config.json": "new"} == written(tmp_path / "here")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"out: \. is the folder that this runs in"):
        place_for(".")


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="exists and is no folder"):
        place_for(tmp_path / "out")


@pytest.mark.parametrize("kind", ["ckpt", "gguf"])
def test_a_command_says_so_before_it_reads_anything(kind, tmp_path, capsys):
    source, out = tmp_path / f"a.{kind}", filled(tmp_path / "out", "config.json", "src/thesis.tex")
    source.write_bytes(b"PK\5\6" + bytes(18))  # whole, as an archive, and neither a checkpoint nor a model
    assert main(["export", "--checkpoint", str(source), "--out", str(out)]) == 1
    assert "out holds src, and an export replaces only" in " ".join(capsys.readouterr().err.split())


def test_a_model_s_own_code_is_replaced_and_a_user_s_stays(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own_model"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(other="names"))
    (folder / "names.py").write_text('NAME = "own"\n')
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"auto_map": auto_map, "model_type": "own", "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer, out = AutoTokenizer.from_pretrained(tiny_model), tmp_path / "out"
    for _ in range(2):
        export_module(model, tokenizer, out)
    assert {path.name for path in Path(out).glob("*.py")} == {"own.py", "names.py"}
    (out / "train.py").touch()
    with pytest.raises(ValueError, match=r"out holds train\.py, and"):
        export_module(model, tokenizer, out)
