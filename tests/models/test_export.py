"""What is exported gives, through plain transformers, the outputs that the trained model gave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lit_align.models.export as export_file
from lit_align.models.checkpoint import checkpoint_entry, read_checkpoint, rebuild
from lit_align.models.export import export, export_module
from lit_align.models.fingerprint import base_fingerprint
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.modes import disable_dropout
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.models.tokens import load_tokenizer

CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
]
for _config in CONFIGS[:2]:
    _config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
EACH_LORA = pytest.mark.parametrize("lora", [None, LoraSettings(r=4, alpha=6)], ids=["whole", "lora"])
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def outputs(model: nn.Module) -> torch.Tensor:
    training, _ = model.training, model.eval()
    with torch.no_grad():
        logits = model(**INPUTS).logits
    model.train(training)
    return logits


def trained(model: nn.Module) -> nn.Module:
    """The model after training: each of its trainable weights has moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save(path: Path, stage: str, role: str, source: ModelSource, model: nn.Module, only_trained: bool = False) -> str:
    """A checkpoint as a stage writes it."""
    learns = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    state = {f"{role}.{k}": v for k, v in model.state_dict().items() if k in learns or not only_trained}
    fingerprints = {f"{role}.base": base_fingerprint(model)} if source.lora else {}
    entry = checkpoint_entry(stage, {role: (source, model)}, load_tokenizer(source), fingerprints)
    torch.save({"state_dict": state, "lit_align": entry}, path)
    return str(path)


@EACH_CONFIG
@EACH_LORA
def test_a_policy_survives_its_export(
    config: dict, lora: LoraSettings | None, tiny_model: Path, tmp_path: Path
) -> None:
    source = ModelSource(config=config, tokenizer=str(tiny_model), lora=lora)
    model = trained(load_causal_lm(source))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_module(model, load_tokenizer(source), tmp_path / "hf")
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(outputs(read_back), outputs(model), **CLOSE)
    assert model.training, "the live model stays as it is"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@EACH_CONFIG
@EACH_LORA
def test_a_reward_model_survives_its_export_padded_on_either_side(
    config: dict, lora: LoraSettings | None, tiny_model: Path, tmp_path: Path
) -> None:
    source = ModelSource(config=config, tokenizer=str(tiny_model), lora=lora)
    model = trained(load_scalar_model(source))
    export_module(model, load_tokenizer(source), tmp_path / "hf")
    read_back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    expected = outputs(model)
    assert expected.shape == (2, 1) and expected.abs().min() > 1e-3
    torch.testing.assert_close(outputs(read_back), expected, **CLOSE)
    pad = AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token_id
    for pair in [(0, 3), (3, 0)]:
        padded = {
            "input_ids": nn.functional.pad(INPUTS["input_ids"], pair, value=pad),
            "attention_mask": nn.functional.pad(torch.ones(2, 6, dtype=torch.long), pair),
        }
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        torch.testing.assert_close(read_back(**padded).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_folded_adapter_is_weight_plus_scaled_product(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(tiny_model), lora=LoraSettings(r=4, alpha=6))
    model = trained(load_causal_lm(source))
    export_module(model, load_tokenizer(source), tmp_path / "hf")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    adapters = {name.replace(".default", ""): value for name, value in model.named_parameters() if ".lora_" in name}
    for name in start:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = start[name]
        if f"{key}.lora_A.weight" in adapters:
            expected = expected + 6 / 4 * adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
        torch.testing.assert_close(weights[name], expected.detach(), **CLOSE)
    assert len(adapters) == 2 * 2 * 7, "seven linear layers in each of two blocks"


@pytest.mark.parametrize(
    ("load", "auto", "extra"),
    [
        (load_causal_lm, AutoModelForCausalLM, {}),
        pytest.param(
            *(load_scalar_model, AutoModelForSequenceClassification, {"num_labels": 1}),
            marks=pytest.mark.xfail(
                Version(transformers.__version__) < Version("5.23"),
                reason="transformers 5.17 loses the head of an adapter that it loads; the export refuses to write it",
            ),
        ),
    ],
    ids=["policy", "reward_model"],
)
def test_an_adapter_may_stay_an_adapter(
    load: Callable, auto: Any, extra: dict, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    source = ModelSource(path=tiny_model.name, lora=LoraSettings(r=4))
    model = trained(load(source))
    export_module(model, load_tokenizer(source), tmp_path / "hf", merge_lora=False)
    monkeypatch.chdir(tmp_path)  # the base is found from anywhere
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    torch.testing.assert_close(outputs(auto.from_pretrained("hf", **extra)), outputs(model), **CLOSE)
    torch.testing.assert_close(outputs(load(ModelSource(path="hf"))), outputs(model), **CLOSE)


@pytest.mark.parametrize("merge_lora", [False, True])
def test_the_base_of_adapters_is_not_replaced_by_them(merge_lora: bool, tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    source = ModelSource(path=str(base), lora=LoraSettings(r=4))
    model = trained(load_causal_lm(source))
    checkpoint = save(tmp_path / "last.ckpt", "sft", "policy", source, model, only_trained=True)
    with pytest.raises(ValueError, match="base is where the base of the adapters is read from"):
        export(checkpoint, str(base), merge_lora=merge_lora)
    with pytest.raises(ValueError, match="base is where the base of the adapters is read from"):
        export_module(model, load_tokenizer(source), base, merge_lora=merge_lora)
    assert (base / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_an_adapter_whose_base_has_no_place_must_be_folded_in(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(config=CONFIGS[0], tokenizer=str(tiny_model), lora=LoraSettings(r=4))
    with pytest.raises(ValueError, match=r"base is not a folder .*merge_lora=true"):
        export_module(load_causal_lm(source), load_tokenizer(source), tmp_path / "hf", merge_lora=False)
    assert not list(tmp_path.iterdir()), "nothing half-done is left"


def test_a_reward_adapter_whose_base_pads_with_the_end_of_turn_must_be_folded_in(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = padded_with_eos(tiny_model, tmp_path / "base")
    source = ModelSource(path=str(folder), lora=LoraSettings(r=4))
    model = trained(load_scalar_model(source))
    with pytest.raises(ValueError, match=r"scores would be read at the wrong token; export with merge_lora=true"):
        export_module(model, load_tokenizer(source), tmp_path / "hf", merge_lora=False)
    export_module(model, load_tokenizer(source), tmp_path / "hf")


def test_for_a_trunk_it_need_not(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(padded_with_eos(tiny_model, tmp_path / "base")), lora=LoraSettings(r=4))
    model = trained(load_scalar_model(source))
    checkpoint = save(tmp_path / "last.ckpt", "rm", "reward_model", source, model, only_trained=True)
    export(checkpoint, str(tmp_path / "adapter"), for_trunk=True)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "config.json").exists()
    read_back = load_scalar_model(ModelSource(path=str(tmp_path / "adapter")))
    torch.testing.assert_close(outputs(read_back), outputs(model), **CLOSE)
    with pytest.raises(ValueError, match="for_trunk: the network was trained whole"):
        export_module(load_scalar_model(source.frozen()), load_tokenizer(source), tmp_path / "no", for_trunk=True)


def padded_with_eos(tiny_model: Path, folder: Path) -> Path:
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    return folder


@pytest.mark.parametrize("base", ["padded_with_eos", "one_special_token"])
def test_plain_transformers_reads_the_score_at_the_final_end_of_turn(
    base: str, tiny_model: Path, bare_model: Path, tmp_path: Path
) -> None:
    folder = padded_with_eos(tiny_model, tmp_path / "base") if base == "padded_with_eos" else bare_model
    source = ModelSource(path=str(folder))
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the trap is set"
    model = trained(load_scalar_model(source))
    export_module(model, tokenizer, tmp_path / "hf")

    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end, "the live tokenizer is in use"
    rows = [[5, 6, 7, end], [8, 9, end, 10, 11, end]]
    with torch.no_grad():
        hidden = [model.eval().base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        expected = torch.stack([model.score.weight[0] @ h for h in hidden])
    read_back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf").pad({"input_ids": rows}, return_tensors="pt")
    torch.testing.assert_close(read_back(**batch).logits[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_the_folder_speaks_as_training_did(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(config=CONFIGS[2] | {"attn_pdrop": 0.2}, tokenizer=str(tiny_model))
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    disable_dropout(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_start|>")
    tokenizer.pad_token = "!"
    export_module(model, tokenizer, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "packed" not in json.dumps(config)
    assert config["pad_token_id"] == tokenizer.pad_token_id == 0
    assert config["use_cache"] and config["attn_pdrop"] == 0.2 and config["architectures"] == ["GPT2LMHeadModel"]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == tokenizer.chat_template
    assert model.config.attn_pdrop == 0.0 and model.config._attn_implementation == "packed", "the live model is in use"
    assert {path.suffix for path in (tmp_path / "hf").iterdir()} == {".json", ".safetensors", ".jinja"}


@EACH_LORA
@pytest.mark.parametrize("only_trained", [False, True], ids=["all weights", "trained weights"])
@pytest.mark.parametrize("role", ["policy", "reward_model"])
def test_a_checkpoint_becomes_the_folder_of_its_model(
    role: str, only_trained: bool, lora: LoraSettings | None, tiny_model: Path, tmp_path: Path
) -> None:
    source = ModelSource(path=str(tiny_model), lora=lora)
    model = trained((load_causal_lm if role == "policy" else load_scalar_model)(source))
    checkpoint = save(tmp_path / "last.ckpt", "some", role, source, model, only_trained)
    export(checkpoint, str(tmp_path / "hf"))
    auto = AutoModelForCausalLM if role == "policy" else AutoModelForSequenceClassification
    torch.testing.assert_close(outputs(auto.from_pretrained(tmp_path / "hf")), outputs(model), **CLOSE)


@EACH_LORA
def test_a_checkpoint_with_all_weights_needs_nothing_else(
    lora: LoraSettings | None, tiny_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    source = ModelSource(path=str(base), lora=lora)
    model = trained(load_causal_lm(source))
    checkpoint = save(tmp_path / "last.ckpt", "sft", "policy", source, model)
    shutil.rmtree(base)
    export(checkpoint, str(tmp_path / "hf"))
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(outputs(read_back), outputs(model), **CLOSE)
    before, after = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert after.get_vocab() == before.get_vocab() and after.chat_template == before.chat_template


@EACH_CONFIG
def test_a_start_from_scratch_is_rebuilt_from_its_checkpoint_without_drawing_anything(
    config: dict, tiny_model: Path, tmp_path: Path
) -> None:
    source = ModelSource(config=config, tokenizer=str(tiny_model))
    model = trained(load_causal_lm(source))
    checkpoint = read_checkpoint(save(tmp_path / "last.ckpt", "pt", "policy", source, model))
    generator = torch.get_rng_state()
    rebuilt = rebuild(*checkpoint, "policy")
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(outputs(rebuilt), outputs(model), rtol=0, atol=0)
    held = {value.data_ptr() for value in checkpoint[1].values()}
    assert all(p.data_ptr() in held for p in rebuilt.parameters()), "no second copy"
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, rebuilt)]
    assert tied == [config["model_type"] == "gpt2"] * 2


def test_a_bfloat16_model_is_exported_bit_by_bit(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(tiny_model), dtype="bfloat16")
    model = trained(load_causal_lm(source))
    export(save(tmp_path / "last.ckpt", "sft", "policy", source, model), str(tmp_path / "hf"))
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert read_back.dtype == torch.bfloat16
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in read_back.state_dict().items())


def test_adapters_are_not_put_on_another_base(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    source = ModelSource(path=str(base), lora=LoraSettings(r=4))
    checkpoint = save(tmp_path / "last.ckpt", "sft", "policy", source, load_causal_lm(source), only_trained=True)
    trained(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(base)
    with pytest.raises(ValueError, match="policy: the base has changed since training"):
        export(checkpoint, str(tmp_path / "hf"))


def test_several_roles_are_exported_by_name(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    policy, critic = trained(load_causal_lm(source)), trained(load_scalar_model(source))
    entry = checkpoint_entry("ppo", {"policy": (source, policy), "critic": (source, critic)}, load_tokenizer(source))
    networks = {"policy": policy, "critic": critic}
    state = {f"{role}.{k}": v for role, network in networks.items() for k, v in network.state_dict().items()}
    torch.save({"state_dict": state, "lit_align": entry}, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), str(tmp_path / "policy"))
    export(str(tmp_path / "last.ckpt"), str(tmp_path / "critic"), role="critic")
    read_back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    torch.testing.assert_close(outputs(read_back), outputs(critic), **CLOSE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="expected one of policy, critic; got 'reward_model'"):
        export(str(tmp_path / "last.ckpt"), str(tmp_path / "x"), role="reward_model")


def test_a_checkpoint_that_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    checkpoint = save(tmp_path / "last.ckpt", "sft", "policy", source, load_causal_lm(source))
    entry, state = read_checkpoint(checkpoint)
    del state["policy.model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 weights missing \(model\.norm\.weight\)"):
        rebuild(entry, state, "policy")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="no stage of lit_align wrote this"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"expected a \.ckpt file; .* is nothing"):
        read_checkpoint(tmp_path / "absent.ckpt")


class Trap:
    """Its unpickling would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_nothing_pickled_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    torch.save({"lit_align": {}, "state_dict": {}, "extra": Trap(tmp_path / "mark")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="neither a tensor nor a plain value"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "mark").exists()


def test_an_export_that_reads_back_wrong_is_an_error_and_leaves_the_old_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(path=str(tiny_model), lora=LoraSettings(r=4))
    model, tokenizer = trained(load_causal_lm(source)), load_tokenizer(source)
    export_module(model, tokenizer, tmp_path / "hf")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()

    def without_one(adapted: nn.Module, device: str) -> dict[str, torch.Tensor]:
        state = merged(adapted, device)
        return state | {"model.layers.1.mlp.up_proj.weight": state["model.layers.0.mlp.up_proj.weight"].clone()}

    merged = export_file.merged_state
    monkeypatch.setattr(export_file, "merged_state", without_one)
    with pytest.raises(ValueError, match=r"does not give the model's outputs: relative difference 0\.\d+"):
        export_module(model, tokenizer, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_replaces_a_model_but_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    (tmp_path / "hf").mkdir()
    export_module(model, tokenizer, tmp_path / "hf")
    export_module(trained(model), tokenizer, tmp_path / "hf")
    torch.testing.assert_close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), outputs(model), **CLOSE)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"diary holds today\.txt, and an export replaces only a folder with"):
        export_module(model, tokenizer, tmp_path / "diary")
    assert (tmp_path / "diary" / "today.txt").exists()
