"""The arithmetic of memory against closed forms by hand, and against what autograd, caches and optimizers keep."""

import bitsandbytes
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from lit_align.batch import Branch, Example, StepTotals, pack
from lit_align.models.forward import hidden_states
from lit_align.models.load import prepare
from lit_align.models.memory import (
    all_gather_bytes,
    all_reduce_bytes,
    head_bytes,
    kv_bytes,
    layer_bytes,
    state_per_weight,
    trunk_bytes,
)
from lit_align.models.meta import meta_network
from lit_align.models.shapes import shape_of, weights_of
from lit_align.models.source import LoraSettings, ModelSource

TOKENS = 48
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 64,
}
# Made anew for each test: `from_config` notes the data type it was asked for in the object it is given.
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0),
}
GEMMA4 = SMALL | {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
}
CONFIGS["gemma4"] = lambda **more: Gemma4TextConfig(**GEMMA4 | more)
SMOLLM = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def smollm(tiny_model, kind="causal", **more):
    return meta_network(ModelSource(config=SMOLLM, tokenizer=str(tiny_model), **more), kind)


# -- closed forms


def test_smollm_has_the_parameters_that_are_published(tiny_model):
    model = smollm(tiny_model)
    weights = weights_of(model)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert weights.trained == 134_515_008 == 49152 * 576 + 30 * (layer + 2 * 576) + 576
    assert (weights.trained_bytes, weights.frozen_bytes) == (4 * 134_515_008, 0)
    assert weights.matrices == 30 * layer and weights.layer_bytes == 4 * (layer + 2 * 576)
    assert weights.table == weights.head == 49152 * 576


def test_smollm_in_bfloat16_with_adapters(tiny_model):
    weights = weights_of(smollm(tiny_model, dtype="bfloat16", lora=LoraSettings(r=16)))
    widths = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    adapters = 30 * sum(16 * (a + b) for a, b in widths)
    assert (weights.trained, weights.trained_bytes) == (adapters, 4 * adapters)  # adapters are in float32
    assert weights.frozen_bytes == 2 * 134_515_008
    assert weights.table == weights.head == 0


def test_a_scalar_model_has_no_vocabulary_and_a_head_in_float32(tiny_model):
    model = smollm(tiny_model, "scalar", dtype="bfloat16")
    weights, shape = weights_of(model), shape_of(model)
    assert shape.vocabulary == 0 and weights.head == 0 and weights.table == 49152 * 576
    assert weights.trained_bytes == 2 * 134_515_008 + 4 * 576


def test_layers_of_several_sizes():
    """The first layer has no experts here: what is gathered at a time is the largest, what is sent are all."""
    options = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    with torch.device("meta"):
        weights = weights_of(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **options)))
    attention = 2 * 32 * 48 + 2 * 32 * 24 + 2 * 32 + 2 * 12
    dense, experts = attention + 3 * 32 * 56, attention + 4 * 32 + 4 * 3 * 32 * 24
    assert weights.layer_bytes == 4 * experts
    assert weights.layers_bytes == 4 * (dense + 2 * experts)
    assert weights.total_bytes - weights.layers_bytes == 4 * (2 * 64 * 32 + 32)


@pytest.mark.parametrize(
    "options, keys, inner",
    [
        ({}, (2 * 32 + 2 * 64) // 4, 192 + 16),
        ({"num_kv_shared_layers": 1, "use_double_wide_mlp": True}, (2 * 32 + 64) // 4, 192 * 5 // 4 + 16),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
            (2 * 32 + 2 * 64) // 4,
            192 + 16 + 2 * 24,
        ),
    ],
    ids=["dense", "shared keys", "experts"],
)
def test_layers_whose_heads_differ(options, keys, inner):
    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(CONFIGS["gemma4"](**options)))
    assert (shape.queries, shape.keys, shape.head) == (4 * (16 + 32) // 2, keys, 32)
    assert shape.inner == inner and shape.gated


def test_feed_forward_parts_of_several_widths():
    options = {"intermediate_size": [40, 56], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4}
    options |= {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
    sizes = {"vocab_size_per_layer_input": 64, "laurel_rank": 4, "altup_num_inputs": 2}
    config = AutoConfig.for_model("gemma3n_text", **SMALL | {"num_hidden_layers": 2} | options | sizes)
    with torch.device("meta"):
        assert shape_of(AutoModelForCausalLM.from_config(config)).inner == 48 + 4


def test_the_cache_of_layers_whose_heads_differ():
    """One of them has the keys of the layer before it."""
    model, cache = AutoModelForCausalLM.from_config(CONFIGS["gemma4"](num_kv_shared_layers=1)), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(5, 11, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(shape_of(model), rows=5, columns=11) == held


def test_a_network_without_attention_cannot_be_planned():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="MambaForCausalLM: its configuration names no heads of attention"):
        shape_of(model)


def test_activations_of_smollm(tiny_model):
    shape = shape_of(smollm(tiny_model))
    h, a, k, i = 576, 576, 192, 1536
    # two norms (input, normalised, result, 1 / rms), queries, keys, values, output, and four of the feed-forward part
    layer = 2 * (3 * h + 1) + 2 * (a + k) + 4 * i
    assert layer_bytes(shape, mixed=False, frozen=False) == 4 * layer == 44_552
    rest = 4 * (2 * h + 1) + 2 * 64 * 4 + 8
    assert trunk_bytes(shape, 1000, False, False, checkpointing=False) == 1000 * (30 * 4 * layer + rest)
    assert trunk_bytes(shape, 1000, False, False, checkpointing=True) == 1000 * (30 * 4 * h + 4 * layer + rest)


def test_activations_under_autocast(tiny_model):
    shape = shape_of(smollm(tiny_model))
    h, a, k, i = 576, 576, 192, 1536
    norms = 2 * (8 * h + 4)
    inputs = 2 * (3 * h + 2 * h + i)  # a copy for each of five matrices; the last one's input is in 16 bits already
    assert layer_bytes(shape, mixed=True, frozen=False) == norms + inputs + 2 * 2 * (a + k) + 2 * 3 * i


def test_the_heads_chunk(tiny_model):
    shape, trained = shape_of(smollm(tiny_model)), 49152 * 576
    found = head_bytes(shape, 2000, "cpu", mixed=False, trained=trained)
    rows = 2**24 // 49152
    assert rows == 341
    assert found.chunk == rows * (49152 + 2048) * 4 + 2 * rows * 576 * 4
    assert found.gradient == 4 * trained and found.states == 2 * 2000 * 576 * 4
    few = head_bytes(shape, 10, "cpu", mixed=False, trained=0)
    assert few.chunk == 10 * (49152 + 2048 + 2 * 576) * 4 and few.gradient == 0
    whole = head_bytes(shape, 2000, "cpu", mixed=False, trained=0, part=900)
    assert whole.chunk == 900 * (49152 + 2048 + 2 * 576) * 4
    gpu = head_bytes(shape, 10**6, "cuda", mixed=True, trained=trained)
    assert gpu.chunk == 4096 * (49152 * 8 + 2 * 576 * 4) + 4 * trained


def test_what_rings_send():
    assert all_reduce_bytes(1000, 4) == 1500 and all_gather_bytes(1000, 4) == 750
    assert all_reduce_bytes(1000, 1) == all_gather_bytes(1000, 1) == 0


# -- what is really kept


def kept(model, mixed):
    """Bytes that autograd keeps in a forward pass, without weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: else its place is given away
        return tensor

    ids = torch.arange(TOKENS) % 32
    example = Example(prefix_ids=ids[:0], branches=(Branch(ids, torch.ones(TOKENS)),))
    batch = pack([example], [0], StepTotals(1.0, 1.0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", enabled=mixed):
        hidden_states(model, batch)
    return sum(size for size, _ in seen.values())


CASES = [
    # The formula is exact for Llama; where adapters lie on the first layer its input needs no gradient.
    ("llama", "float32", False, False, 0.0),
    ("llama", "bfloat16", False, False, 0.0),
    ("llama", "float32", True, False, 0.0),
    ("llama", "float32", False, True, 0.03),
    ("llama", "bfloat16", False, True, 0.03),
    ("llama", "float32", True, True, 0.05),
    ("qwen3", "float32", False, False, 0.01),
    ("qwen3", "bfloat16", False, False, 0.01),
    ("qwen3", "float32", True, False, 0.07),
    ("gpt2", "float32", False, False, 0.05),
    ("gpt2", "bfloat16", False, False, 0.05),
    ("gemma4", "float32", False, False, 0.09),
    ("gemma4", "float32", False, True, 0.09),
    ("gemma4", "float32", True, False, 0.06),
]


@pytest.mark.parametrize("name, dtype, mixed, lora, tolerance", CASES)
def test_activations_are_what_autograd_keeps(name, dtype, mixed, lora, tolerance):
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=getattr(torch, dtype))
    adapters = LoraSettings(r=4) if lora else None
    model = prepare(model, ModelSource(path="x", dtype=dtype, lora=adapters), "causal").eval()
    shape, weights = shape_of(model), weights_of(model)
    copies = 2 * weights.matrices if mixed else 0
    found = kept(model, mixed)
    assert trunk_bytes(shape, TOKENS, mixed, lora, False) + copies == pytest.approx(found, rel=tolerance, abs=0)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_cache_of_keys_and_values(mixed):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    cache = DynamicCache()
    with torch.no_grad(), torch.autocast("cpu", enabled=mixed):
        model(input_ids=torch.zeros(5, 11, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(shape_of(model), rows=5, columns=11) == held == 5 * 11 * 3 * 2 * 24 * 4


@pytest.mark.parametrize(
    "build, dtype, size",
    [
        (lambda p: torch.optim.AdamW(p), torch.float32, 8),
        (lambda p: torch.optim.AdamW(p), torch.bfloat16, 4),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), torch.float32, 12),
        (lambda p: torch.optim.SGD(p), torch.float32, 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), torch.float32, 4),
    ],
)
def test_state_of_an_optimizer(build, dtype, size):
    assert state_per_weight(build, dtype) == size


def test_state_of_adamw_in_8_bits():
    # two moments of a byte, a scale for each 256 numbers of each, and two tables of 256 values
    found = state_per_weight(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3), torch.float32)
    assert found == pytest.approx(2 + 8 / 256, rel=0.01)
