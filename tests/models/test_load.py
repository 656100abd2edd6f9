"""Every way to a network: folder, configuration, adapters, scalar form; and what is said when there is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_align.models.load import load_causal_lm, load_scalar_model, set_attention
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.models.tokens import end_of_turn_id, load_tokenizer, separate_pad_token

CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
]
for _config in CONFIGS[:2]:
    _config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}


def outputs(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**INPUTS).logits


def test_a_folder_gives_its_model_ready_for_training(tiny_model: Path) -> None:
    model = load_causal_lm(ModelSource(path=str(tiny_model)))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "packed"
    assert model(**INPUTS).past_key_values is None, "training forwards keep no cache"
    assert model.generation_config.use_cache, "generation does"
    torch.testing.assert_close(outputs(model), outputs(AutoModelForCausalLM.from_pretrained(tiny_model)))


def test_dtype_attention_and_checkpointing_are_as_asked(tiny_model: Path) -> None:
    asked = ModelSource(path=str(tiny_model), dtype="bfloat16", attention="eager", gradient_checkpointing=True)
    model = load_causal_lm(asked)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing


def test_gradient_checkpointing_gives_the_same_gradients_with_adapters_too(tiny_model: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        source = ModelSource(path=str(tiny_model), lora=LoraSettings(r=2), gradient_checkpointing=checkpointing)
        model = load_causal_lm(source)
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@EACH_CONFIG
def test_a_configuration_starts_from_scratch_with_the_tokenizers_numbers(config: dict, tiny_model: Path) -> None:
    source = ModelSource(config=config, tokenizer=str(tiny_model))
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    assert model.config.model_type == config["model_type"]
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.bos_token_id is None
    assert model.training and model.config._attn_implementation == "packed"


def test_a_start_from_scratch_follows_the_seed(tiny_model: Path) -> None:
    source = ModelSource(config=CONFIGS[0], tokenizer=str(tiny_model))
    first, second = (torch.manual_seed(3) and load_causal_lm(source) for _ in range(2))
    torch.testing.assert_close(outputs(first), outputs(second), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, r"policy\.config\.model_type: no such type 'lama'; did you mean .*llama"),
        ({"hiden_size": 8}, r"policy\.config: llama has no key 'hiden_size'; did you mean hidden_size"),
        ({"vocab_size": 100}, r"policy\.config\.vocab_size: expected at least the tokenizer's 259; got 100"),
        ({"hidden_size": "x"}, r"policy\.config: .*hidden_size.*expected int"),
        ({"hidden_size": 15}, r"policy\.config: .*not a multiple"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict, message: str, tiny_model: Path) -> None:
    source = ModelSource(config=CONFIGS[0] | change, tokenizer=str(tiny_model))
    with pytest.raises(ValueError, match=message):
        load_causal_lm(source, "policy")


def test_a_larger_vocabulary_than_the_tokenizers_is_kept(tiny_model: Path) -> None:
    source = ModelSource(config=CONFIGS[0] | {"vocab_size": 320}, tokenizer=str(tiny_model))
    assert load_causal_lm(source).config.vocab_size == 320


def test_a_place_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy\.path: cannot load 'models/absent' \(no such folder"):
        load_causal_lm(ModelSource(path="models/absent"), "policy")
    with pytest.raises(ValueError, match=r"policy\.path: cannot load "):
        load_causal_lm(ModelSource(path=str(tmp_path)), "policy")
    with pytest.raises(ValueError, match=r"policy\.tokenizer: cannot load a tokenizer from "):
        load_tokenizer(ModelSource(path=str(tmp_path)), "policy")


def test_a_folder_that_lacks_weights_is_refused_instead_of_filled_with_random_ones(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_causal_lm, load_scalar_model):
        with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj\.weight"):
            load(ModelSource(path=str(folder)))


def test_a_model_that_asks_to_run_its_own_code_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot load"):
        load_causal_lm(ModelSource(path=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "trait", [{"_is_stateful": True}, {"_supports_sdpa": False}, {"_supports_attention_backend": False}]
)
def test_what_cannot_be_packed_keeps_its_own_attention(trait: dict[str, bool], tiny_model: Path) -> None:
    model = load_causal_lm(ModelSource(path=str(tiny_model), attention="sdpa"))
    for name, value in trait.items():
        setattr(model, name, value)
    set_attention(model, "packed")
    assert model.config._attn_implementation == "sdpa"


@EACH_CONFIG
def test_adapters_alone_are_trained_and_change_nothing_at_first(config: dict, tiny_model: Path) -> None:
    source = ModelSource(config=config, tokenizer=str(tiny_model))
    torch.manual_seed(1)
    plain = load_causal_lm(source)
    torch.manual_seed(1)
    adapted = load_causal_lm(replace(source, lora=LoraSettings(r=4, dropout=0.5)))
    assert isinstance(adapted, PeftModel) and adapted.training
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 and m.training for m in adapted.modules())
    torch.testing.assert_close(outputs(adapted), outputs(plain), rtol=0, atol=0)


def test_adapters_go_where_they_are_asked_to(tiny_model: Path) -> None:
    lora = LoraSettings(r=4, target_modules=["q_proj", "v_proj"])
    adapted = load_causal_lm(ModelSource(path=str(tiny_model), lora=lora))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}


@EACH_CONFIG
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_scalar_head_is_float32_at_least_under_autocast_too(config: dict, dtype: str, tiny_model: Path) -> None:
    model = load_scalar_model(ModelSource(config=config, tokenizer=str(tiny_model), dtype=dtype))
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert model.score.weight.dtype == expected and model.score.out_features == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.score(torch.ones(3, 16, dtype=torch.bfloat16)).dtype == expected
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_scalar_model_takes_the_trunk_of_a_language_model_under_a_fresh_head(tiny_model: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    model = load_scalar_model(source)
    trunk = load_causal_lm(source).model.state_dict()
    assert list(model.model.state_dict()) == list(trunk)
    for name, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight, trunk[name], rtol=0, atol=0)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_a_fresh_head_prefers_nothing(lora: LoraSettings | None, tiny_model: Path) -> None:
    from_folder = ModelSource(path=str(tiny_model), lora=lora)
    from_scratch = ModelSource(config=CONFIGS[0], tokenizer=str(tiny_model), lora=lora)
    for source in (from_folder, from_scratch):
        assert not outputs(load_scalar_model(source)).any()


def test_a_scalar_model_trains_its_head_along_with_its_adapters(tiny_model: Path) -> None:
    model = load_scalar_model(ModelSource(path=str(tiny_model), lora=LoraSettings(r=4)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in trained if ".lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]
    assert model.get_base_model().score(torch.ones(2, 32)).dtype == torch.float32


def test_a_stored_float32_head_is_not_rounded_by_a_bfloat16_trunk(tiny_model: Path, tmp_path: Path) -> None:
    model = load_scalar_model(ModelSource(path=str(tiny_model)))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    again = load_scalar_model(ModelSource(path=str(tmp_path), dtype="bfloat16"))
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(again.score.weight, model.score.weight)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert plain.score.weight.dtype == torch.bfloat16, "the library's own loads do not change transformers' for others"


def test_a_classifier_of_several_labels_is_no_scalar_model(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight .* has shape \(3, 32\); .* expects \(1, 32\)"):
        load_scalar_model(ModelSource(path=str(tmp_path)))


def test_an_architecture_without_a_scalar_form_is_refused(tiny_model: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="expected a linear head `score`"):
        load_scalar_model(ModelSource(config=config, tokenizer=str(tiny_model)))


def test_the_end_of_turn_is_what_the_template_writes_after_an_answer(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(ModelSource(path=str(tiny_model)))
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn_id(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('a system message comes first') }}"
    assert end_of_turn_id(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn_id(tokenizer) is None


def test_a_padding_token_that_ends_no_text_is_found_or_added(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(ModelSource(path=str(tiny_model)))
    kept = tokenizer.pad_token_id
    assert separate_pad_token(tokenizer) == kept
    tokenizer.pad_token = tokenizer.eos_token
    assert separate_pad_token(tokenizer) == kept, "the vocabulary has one"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="<|im_end|>")
    tokenizer.eos_token = "<|im_start|>"
    assert separate_pad_token(tokenizer) not in (tokenizer.eos_token_id, end_of_turn_id(tokenizer))


def test_a_scalar_model_grows_by_one_token_where_none_is_free(bare_model: Path) -> None:
    source = ModelSource(path=str(bare_model))
    model = load_scalar_model(source)
    before = load_causal_lm(source).get_input_embeddings().weight
    after = model.get_input_embeddings().weight
    assert len(after) == len(before) + 1 == model.config.vocab_size
    assert model.config.pad_token_id == len(before)
    assert torch.equal(after[:-1], before) and not after[-1].any()


def test_an_adapter_folder_is_folded_into_its_base(tiny_model: Path, tmp_path: Path) -> None:
    adapted = load_causal_lm(ModelSource(path=str(tiny_model), lora=LoraSettings(r=4)))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    folded = load_causal_lm(ModelSource(path=str(tmp_path)))
    assert not isinstance(folded, PeftModel) and all(p.requires_grad for p in folded.parameters())
    torch.testing.assert_close(outputs(folded), outputs(adapted), rtol=1e-6, atol=1e-6)
    scalar = load_scalar_model(ModelSource(path=str(tmp_path), lora=LoraSettings(r=2)))
    torch.testing.assert_close(scalar.get_base_model().model.embed_tokens.weight, folded.model.embed_tokens.weight)
    key = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(
        scalar.get_base_model().get_submodule(key).base_layer.weight, folded.get_submodule(key).weight, rtol=0, atol=0
    )
