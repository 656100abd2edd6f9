"""The reference is the start of the policy, stays it, and can be recognised."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_align.models.fingerprint import base_fingerprint, fingerprint
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.modes import disable_dropout, dropout_settings, evaluating
from lit_align.models.reference import make_reference, reference_mode
from lit_align.models.source import LoraSettings, ModelSource

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def train_somehow(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1


def test_the_reference_is_read_from_where_the_policy_began_even_if_the_policy_has_moved(tiny_model: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    policy = load_causal_lm(source)
    train_somehow(policy)
    reference = make_reference(policy, source)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(outputs(reference), outputs(expected))
    assert fingerprint(reference) == fingerprint(expected) != fingerprint(policy)


def test_a_reference_is_frozen_in_evaluation_and_beyond_dropout(tiny_model: Path) -> None:
    source = ModelSource(config=GPT2 | {"resid_pdrop": 0.5, "attn_pdrop": 0.5}, tokenizer=str(tiny_model))
    reference = make_reference(load_causal_lm(source), source)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    still = outputs(reference)
    torch.testing.assert_close(outputs(reference.train()), still, rtol=0, atol=0)


def test_a_reference_of_its_own_may_be_another_model(tiny_model: Path, bare_model: Path) -> None:
    policy = load_causal_lm(ModelSource(path=str(tiny_model), lora=LoraSettings(r=2)))
    other = ModelSource(path=str(bare_model), lora=LoraSettings(r=2), gradient_checkpointing=True)
    reference = make_reference(policy, ModelSource(path=str(tiny_model)), other)
    assert reference.config.model_type == "gpt2"
    assert not any(".lora_" in name for name, _ in reference.named_parameters())


def test_a_start_from_scratch_is_copied_since_it_lives_nowhere_else(tiny_model: Path) -> None:
    source = ModelSource(config=GPT2, tokenizer=str(tiny_model))
    policy = load_causal_lm(source)
    reference = make_reference(policy, source)
    assert fingerprint(reference) == fingerprint(policy)
    train_somehow(policy)
    assert fingerprint(reference) != fingerprint(policy)


def test_with_adapters_the_reference_is_the_policy_without_them(tiny_model: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    adapted = replace(source, lora=LoraSettings(r=4, dropout=0.5))
    policy = load_causal_lm(adapted)
    assert make_reference(policy, adapted) is None
    train_somehow(policy)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    with reference_mode(policy) as reference:
        assert not reference.training and not torch.is_grad_enabled()
        torch.testing.assert_close(outputs(reference), outputs(load_causal_lm(source).eval()), rtol=0, atol=0)
    assert policy.training and all(m.training for m in policy.modules())
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
    assert (outputs(policy.eval()) - outputs(load_causal_lm(source).eval())).abs().max() > 0.01


def test_a_policy_without_adapters_is_never_its_own_reference(tiny_model: Path) -> None:
    with (
        pytest.raises(ValueError, match="expected a policy with adapters"),
        reference_mode(load_causal_lm(ModelSource(path=str(tiny_model)))),
    ):
        pass


def test_one_bit_changes_the_fingerprint(tiny_model: Path) -> None:
    model = load_causal_lm(ModelSource(path=str(tiny_model)))
    before = fingerprint(model)
    assert before == fingerprint(copy.deepcopy(model)) and len(before) == 64
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[3] ^= 1
    assert fingerprint(model) != before
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[3] ^= 1
    assert fingerprint(model) == before


def test_name_shape_and_dtype_are_part_of_the_fingerprint() -> None:
    zeros = nn.Parameter(torch.zeros(2, 3))
    fingerprints = [
        fingerprint(nn.ParameterDict({name: value}))
        for name, value in [
            ("a", zeros),
            ("b", zeros),
            ("a", nn.Parameter(torch.zeros(3, 2))),
            ("a", nn.Parameter(torch.zeros(2, 3, dtype=torch.int32), requires_grad=False)),
            ("a", nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))),
        ]
    ]
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_the_base_under_adapters_keeps_its_fingerprint_through_training(load: object, tiny_model: Path) -> None:
    source = ModelSource(path=str(tiny_model), lora=LoraSettings(r=4))
    model = load(source)
    before = base_fingerprint(model)
    train_somehow(model)
    assert base_fingerprint(model) == before
    if load is load_scalar_model:
        nn.init.normal_(model.get_base_model().score.original_module.weight)
        assert base_fingerprint(model) == before, "a head that is trained anew is no part of the base"
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] += 1e-6
    assert base_fingerprint(model) != before


def test_the_base_under_adapters_has_the_plain_models_fingerprint(tiny_model: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    adapted = load_causal_lm(replace(source, lora=LoraSettings(r=4)))
    assert base_fingerprint(adapted) == fingerprint(load_causal_lm(source)) == base_fingerprint(load_causal_lm(source))


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_disabled_dropout_is_off_everywhere_and_remembered(attention: str, tiny_model: Path) -> None:
    for config in (
        GPT2 | {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
        {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        | {"num_hidden_layers": 2, "attention_dropout": 0.5},
    ):
        source = ModelSource(config=config, tokenizer=str(tiny_model), lora=LoraSettings(dropout=0.5))
        model = load_causal_lm(replace(source, attention=attention))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter)
        assert not torch.equal(outputs(model), outputs(model)), "there was dropout"
        disable_dropout(model)
        disable_dropout(model)
        torch.testing.assert_close(outputs(model), outputs(model), rtol=0, atol=0)
        said = {key: value for key, value in config.items() if "drop" in key}
        assert said.items() <= dropout_settings(model).items()


def test_evaluation_ends_as_it_began() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model[0].training and not model[1].training
