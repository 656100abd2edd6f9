"""What lies on a policy's base and what is refused, architecture by architecture."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from trunk import spread, write_reward_adapter

from lit_align.batch import Branch, Example, StepTotals, pack
from lit_align.models import scalar_at_ends, token_logps
from lit_align.models.load import load_causal_lm, load_scalar_model, load_tokenizer
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.models.trunk import OwnWeights, SharedTrunk

LORA = LoraSettings(r=4, alpha=8)
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2},
}


def batch():
    ids = torch.arange(10, 30)
    branches = [Branch(ids[5:12], torch.ones(7)), Branch(ids[12:], torch.ones(8))]
    return pack([Example(ids[:5], tuple(branches))], range(1), StepTotals(1.0, 1.0))


def folder_of(kind, tiny_model, out) -> ModelSource:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else sizes
    config = {"model_type": kind, **sizes, **ARCHITECTURES[kind]}
    torch.manual_seed(3)
    load_causal_lm(ModelSource(config=config, tokenizer=str(tiny_model))).save_pretrained(out)
    load_tokenizer(ModelSource(path=str(tiny_model))).save_pretrained(out)
    return ModelSource(path=str(out), lora=LORA)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_critic_on_the_trunk_is_the_critic_alone(kind, tiny_model, tmp_path):
    source = folder_of(kind, tiny_model, tmp_path)
    policy = load_causal_lm(source)
    critic, alone = SharedTrunk(source).scalar_model(policy, source, "critic"), load_scalar_model(source, "critic")
    spread(alone, 1)
    own = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    assert own.keys() == {name for name, p in critic.named_parameters() if p.requires_grad}
    assert critic.load_state_dict(own, strict=False).unexpected_keys == []
    for network in (critic, alone):
        assert network.training and network.config.pad_token_id == alone.config.pad_token_id
        network.eval()  # GPT-2 has dropout
    found, expected = scalar_at_ends(critic, batch()), scalar_at_ends(alone, batch())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()
    expected.sum().backward()
    for (name, p), (_, other) in zip(critic.named_parameters(), alone.named_parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None) == (not p.requires_grad), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=0)
    assert all(p.grad is None for p in policy.parameters())


def test_a_fresh_critic_expects_nothing_and_changes_nothing(tiny_model):
    source = ModelSource(path=str(tiny_model), lora=LORA)
    policy = load_causal_lm(source)
    before = token_logps(policy, batch()).detach()
    critic = SharedTrunk(source).scalar_model(policy, source, "critic")
    assert torch.equal(scalar_at_ends(critic, batch()), torch.zeros(2))
    spread(critic, 1)
    torch.testing.assert_close(token_logps(policy, batch()), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_of_a_folder_give_what_they_give_folded_into_their_base(kind, tiny_model, tmp_path):
    source = folder_of(kind, tiny_model, tmp_path / "base")
    reward = write_reward_adapter(source.path, tmp_path / "rm")
    on_trunk = SharedTrunk(source).scalar_model(load_causal_lm(source), reward, "reward_model").eval()
    folded = OwnWeights().scalar_model(None, reward, "reward_model").eval()
    torch.testing.assert_close(scalar_at_ends(on_trunk, batch()), scalar_at_ends(folded, batch()), rtol=1e-5, atol=1e-6)


def test_adapters_of_a_policy_may_start_a_critic_under_a_fresh_head(tiny_model, tmp_path):
    from lit_align.models.export import export_module

    source = ModelSource(path=str(tiny_model), lora=LoraSettings(r=2, alpha=4))
    other = load_causal_lm(source)
    spread(other, 4)
    export_module(other, load_tokenizer(source), tmp_path / "sft", merge_lora=False)
    trunk = SharedTrunk(ModelSource(path=str(tiny_model), lora=LORA))
    start = ModelSource(path=str(tmp_path / "sft"))
    critic = trunk.scalar_model(load_causal_lm(trunk.policy), start, "critic")
    own = dict(critic.named_parameters())
    for name, p in other.named_parameters():
        if p.requires_grad:
            assert torch.equal(own[name], p)
    assert torch.equal(scalar_at_ends(critic, batch()), torch.zeros(2))
    made = trunk.source_of(start, "critic")
    assert made.path == str(tiny_model) and (made.lora.r, made.lora.alpha) == (2, 4)


def test_a_quantised_base_is_shared_with_what_says_how_it_is_quantised(tiny_model, tmp_path):
    """4-bit layers hold more than tensors; here they are put in by hand."""
    import bitsandbytes as bnb

    source = ModelSource(path=str(tiny_model), lora=LORA)
    plain = load_causal_lm(ModelSource(path=str(tiny_model)))
    for layer in plain.model.layers:
        weight = layer.mlp.up_proj.weight.data
        four = bnb.nn.Linear4bit(32, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        four.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        layer.mlp.up_proj = four
    from lit_align.models.adapters import add_adapters

    policy = add_adapters(plain, LORA, "causal")
    with torch.no_grad():
        quantised = plain.model(input_ids=batch().input_ids).last_hidden_state
        critic = SharedTrunk(source).scalar_model(policy, source, "critic")
        found = critic.get_base_model().model(input_ids=batch().input_ids).last_hidden_state
        whole = load_causal_lm(source).get_base_model().model(input_ids=batch().input_ids).last_hidden_state
    torch.testing.assert_close(found, quantised, rtol=0, atol=0)
    assert not torch.allclose(whole, quantised, rtol=1e-3)
    ours = critic.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert ours is not plain.model.layers[0].mlp.up_proj.base_layer
    assert ours.weight is plain.model.layers[0].mlp.up_proj.base_layer.weight


def test_compiled_layers_are_each_networks_own(tiny_model):
    source = ModelSource(path=str(tiny_model), lora=LORA)
    policy = load_causal_lm(source)
    compiled = ModelSource(path=str(tiny_model), lora=LORA, compile=True)
    critic = SharedTrunk(source).scalar_model(policy, compiled, "critic")
    assert [layer._compiled_call_impl is None for layer in policy.get_base_model().model.layers] == [True] * 2
    assert [layer._compiled_call_impl is None for layer in critic.get_base_model().model.layers] == [False] * 2


def copy_of(tiny_model, folder):
    return ModelSource(path=str(shutil.copytree(tiny_model, folder)))


def with_settings(folder, text, replacement):
    file = folder / "adapter_config.json"
    content = file.read_text()
    assert text in content
    file.write_text(content.replace(text, replacement))


def test_what_does_not_lie_on_the_base_is_refused(tiny_model, tmp_path):
    policy = ModelSource(path=str(tiny_model), lora=LORA)
    trunk, other = SharedTrunk(policy), copy_of(tiny_model, tmp_path / "other")
    elsewhere = write_reward_adapter(other.path, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"reward_model.path: the adapters in .*elsewhere' were trained on .*other'"):
        trunk.source_of(elsewhere, "reward_model")
    whole = r"critic: with shared_trunk expected a folder of adapters .* got path .* without lora"
    with pytest.raises(ValueError, match=whole):
        trunk.source_of(ModelSource(path=str(tiny_model)), "critic")
    with pytest.raises(ValueError, match=r"with shared_trunk expected a folder of adapters .* with lora"):
        trunk.source_of(ModelSource(path=other.path, lora=LORA), "critic")
    with pytest.raises(ValueError, match=r"set policy.lora"):
        SharedTrunk(ModelSource(path=str(tiny_model)))
    reward = write_reward_adapter(tiny_model, tmp_path / "rm")
    with pytest.raises(ValueError, match=r"reward_model.dtype: the policy's base is in float32, got bfloat16"):
        trunk.source_of(ModelSource(path=reward.path, dtype="bfloat16"), "reward_model")
    with pytest.raises(ValueError, match=r"critic.lora: the adapters in .* leave it out"):
        trunk.source_of(ModelSource(path=reward.path, lora=LORA), "critic")
    with_settings(tmp_path / "rm", '"use_dora": false', '"use_dora": true')
    with pytest.raises(ValueError, match=r"not plain low-rank ones \(use_dora: True in adapter_config.json\)"):
        trunk.source_of(reward, "reward_model")


def test_weights_that_do_not_fit_are_refused(tiny_model, tmp_path):
    reward = write_reward_adapter(tiny_model, tmp_path / "rm")
    with_settings(tmp_path / "rm", '"r": 3', '"r": 2')
    source = ModelSource(path=str(tiny_model), lora=LORA)
    with pytest.raises(ValueError, match=r"does not fit the model: none absent, none unknown, 28 weights .* shape"):
        SharedTrunk(source).scalar_model(load_causal_lm(source), reward, "reward_model")
    (tmp_path / "rm" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors; export the adapter with for_trunk=true"):
        SharedTrunk(source).scalar_model(load_causal_lm(source), reward, "reward_model")


def test_a_tokenizer_without_a_token_for_padding_is_refused(tiny_model, tmp_path, monkeypatch):
    from lit_align.models import trunk

    source = ModelSource(path=str(tiny_model), lora=LORA)
    monkeypatch.setattr(trunk, "separate_pad_token", lambda tokenizer: 259)
    with pytest.raises(ValueError, match=r"critic: the tokenizer has no token left for padding"):
        SharedTrunk(source).scalar_model(load_causal_lm(source), source, "critic")


def test_a_policy_that_starts_from_adapters_has_them_in_its_base(tiny_model, tmp_path):
    from lit_align.models.export import export_module

    first = load_causal_lm(ModelSource(path=str(tiny_model), lora=LORA))
    spread(first, 4)
    export_module(first, load_tokenizer(ModelSource(path=str(tiny_model))), tmp_path / "sft", merge_lora=False)
    source = ModelSource(path=str(tmp_path / "sft"), lora=LORA)
    policy = load_causal_lm(source)
    critic = SharedTrunk(source).scalar_model(policy, source, "critic")
    ours = critic.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert ours is policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(scalar_at_ends(critic, batch()), torch.zeros(2))
