"""Model FLOPs against closed forms, published figures and what torch counts."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from lit_align.batch import Branch, Example, StepTotals, pack
from lit_align.batch.work import Work
from lit_align.models import scalar_at_ends, token_logps, token_loss
from lit_align.models.adapters import add_adapters
from lit_align.models.attention import PACKED
from lit_align.models.flops import Flops, active_share, forward_flops, state_bytes, training_flops, update_bytes
from lit_align.models.scalar import install_head
from lit_align.models.source import LoraSettings
from lit_align.models.span_sdpa import span_sdpa

# As published: hidden, feed-forward, layers, heads, key heads, head width, vocabulary, tied.
MODELS = {
    "SmolLM2-135M": (LlamaConfig, 576, 1536, 30, 9, 3, 64, 49152, True),
    "Qwen3-0.6B": (Qwen3Config, 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Llama-3.2-1B": (LlamaConfig, 2048, 8192, 16, 32, 8, 64, 128256, True),
    "Qwen3-1.7B": (Qwen3Config, 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen3-4B": (Qwen3Config, 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Llama-3.1-8B": (LlamaConfig, 4096, 14336, 32, 32, 8, 128, 128256, False),
}
# GF of full training per token at 1k, 4k and 8k, from the formula of the field; 8B at 8k is NVIDIA's own
# 744 TFLOP/s / 14,451 tokens/s = 51.5.
GIGA = {
    "SmolLM2-135M": (0.91, 1.23, 1.66),
    "Qwen3-0.6B": (3.93, 4.99, 6.39),
    "Llama-3.2-1B": (7.62, 8.22, 9.03),
    "Qwen3-1.7B": (10.7, 11.7, 13.1),
    "Qwen3-4B": (25.0, 27.8, 31.4),
    "Llama-3.1-8B": (45.8, 48.3, 51.5),
}


def on_meta(name):
    kind, hidden, inner, layers, heads, key_heads, width, vocabulary, tied = MODELS[name]
    config = kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def document(tokens):
    return Work(1, 1, tokens, tokens, tokens, 0, tokens, tokens * tokens / 2)


@pytest.mark.parametrize("name", MODELS)
def test_training_cost_of_known_models_on_the_meta_device(name):
    _, hidden, inner, layers, heads, key_heads, width, vocabulary, _ = MODELS[name]
    cost = training_flops(on_meta(name))
    layer = hidden * heads * width * 2 + 2 * hidden * key_heads * width + 3 * hidden * inner
    for tokens, giga in zip((1024, 4096, 8192), GIGA[name], strict=True):
        forward = (
            2 * layers * layer * tokens + 2 * hidden * vocabulary * tokens + 2 * layers * heads * width * tokens**2
        )
        assert cost.of(document(tokens)) == 3 * forward
        assert cost.of(document(tokens)) / tokens / 1e9 == pytest.approx(giga, rel=6e-3)


def test_a_token_meets_its_own_experts_and_the_router():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        cost = forward_flops(AutoModelForCausalLM.from_config(config))
    attention, experts, router = 2 * 32 * 32 + 2 * 32 * 16, 2 * 3 * 32 * 48, 8 * 32
    assert cost == Flops(token=2 * 3 * (attention + experts + router), scored=2 * 32 * 100, pair=4 * 3 * 32)


def test_gpt2s_transposed_matrices_count_and_its_tables_do_not():
    with torch.device("meta"):
        cost = forward_flops(AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=4)))
    assert cost == Flops(token=2 * 2 * 12 * 32 * 32, scored=2 * 32 * 50257, pair=4 * 2 * 32)


def tiny(kind=AutoModelForCausalLM, **settings):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, attn_implementation=PACKED, pad_token_id=0, **settings,
    )  # fmt: skip
    return kind.from_config(config)


def pairs():
    sizes = [(5, 3, 4), (1, 2, 2), (0, 7, 6)]
    ids = torch.arange(1, 100)
    examples = [
        Example(ids[:prefix], tuple(Branch(ids[:n], torch.ones(n)) for n in branches)) for prefix, *branches in sizes
    ]
    return pack(examples, range(3), StepTotals(1.0, 1.0))


def counted(function):
    """What torch counts, and how much of it is attention's; the mathematical kernel, whose products it sees."""

    def by_kernel(query, key, value, spans, scores):
        return span_sdpa(query, key, value, spans, scores.scale, scores.window, 0.0)

    with (
        mock.patch("lit_align.models.attention.span_attention", by_kernel),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        function()
    counts = counter.get_flop_counts()["Global"]
    attention = counts.get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops() - attention, attention


def rectangles(batch):
    """Pairs that the kernel works on: it does not leave out what the causal mask forbids."""
    return sum((s.stop - s.start) * (s.stop - s.start + s.prefix_stop - s.prefix_start) for s in batch.varlen.spans)


def without_attention(cost):
    return Flops(cost.token, cost.scored, cost.sequence)


def test_torch_counts_the_same_in_full_training():
    model, batch = tiny(), pairs()
    cost = training_flops(model)
    matrices, attention = counted(lambda: token_logps(model, batch).sum().backward())
    assert matrices == without_attention(cost).of(batch.work)
    assert attention == cost.pair * rectangles(batch)
    assert batch.work.attended == pytest.approx(
        rectangles(batch) - sum((s.stop - s.start) ** 2 / 2 for s in batch.varlen.spans)
    )


GEMMA4 = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 64, "vocab_size": 100,
    "vocab_size_per_layer_input": 100, "pad_token_id": 0, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size_per_layer_input": 4},
        {"hidden_size_per_layer_input": 4, "num_kv_shared_layers": 1, "use_double_wide_mlp": True}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        {"hidden_size_per_layer_input": 0} | GEMMA4_EXPERTS,
    ],
    ids=["dense", "shared keys", "experts"],
)
def test_torch_counts_the_same_where_layers_differ(options):
    """Gemma 4's full layers have wider heads; with experts each token meets some beside the dense part."""
    config = Gemma4TextConfig(**GEMMA4 | options)
    config._experts_implementation = "eager"
    model, batch = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED), pairs()
    cost = training_flops(model)
    assert cost.pair == 3 * 2 * 2 * 4 * sum(16 if kind == "full_attention" else 8 for kind in config.layer_types)
    matrices, attention = counted(lambda: token_logps(model, batch).sum().backward())
    assert matrices == without_attention(cost).of(batch.work)
    assert attention == cost.pair * rectangles(batch)


def test_a_network_without_attention_has_no_pairs():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2))
    cost = forward_flops(model)
    assert cost.pair == 0 and cost.token > 0


def test_an_unknown_number_of_experts_is_no_guess():
    with pytest.raises(ValueError, match=r"some_moe: .* how many experts a token meets"):
        active_share(SimpleNamespace(model_type="some_moe", num_experts=8))


def test_torch_counts_the_same_without_gradient():
    model, batch = tiny(), pairs()
    cost = forward_flops(model)
    with torch.no_grad():
        matrices, attention = counted(lambda: token_logps(model, batch))
    assert matrices == without_attention(cost).of(batch.work)
    assert attention == cost.pair * rectangles(batch)
    assert training_flops(model) == Flops(*(3 * getattr(cost, f) for f in ("token", "scored", "sequence", "pair")))


def test_adapters_add_themselves_and_save_the_weights_gradient():
    model, batch = tiny(), pairs()
    plain = forward_flops(model)
    adapted = add_adapters(model, LoraSettings(r=4), "causal")
    ranks = 3 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert forward_flops(adapted, adapters=False) == plain
    assert forward_flops(adapted).token == plain.token + 2 * ranks
    cost = training_flops(adapted)
    assert cost.token == 2 * plain.token + 3 * 2 * ranks and cost.scored == 2 * plain.scored
    assert cost.pair == 3 * plain.pair
    matrices, attention = counted(lambda: token_loss(adapted, batch, lambda stats, part: stats.logps.sum()).backward())
    # The embeddings are frozen: what goes into the first layer's q, k and v needs no gradient; neither base nor A.
    first = 2 * (32 * (32 + 16 + 16) + 3 * 4 * 32) * batch.work.tokens
    assert matrices == without_attention(cost).of(batch.work) - first
    assert attention == cost.pair * rectangles(batch)


@pytest.mark.parametrize("lora", [False, True])
def test_a_reward_model_has_no_vocabulary(lora):
    model, batch = tiny(AutoModelForSequenceClassification, num_labels=1), pairs()
    install_head(model, fresh=True)
    plain = forward_flops(model, "ends")
    assert plain.scored == 0 and plain.sequence == 2 * 32
    if lora:
        model = add_adapters(model, LoraSettings(r=4), "scalar")
        assert training_flops(model, "ends").sequence == 3 * 2 * 32
        return
    matrices, _ = counted(lambda: scalar_at_ends(model, batch).sum().backward())
    assert matrices == without_attention(training_flops(model, "ends")).of(batch.work)


def test_what_padding_and_repeated_prompts_cost_is_not_counted():
    cost = Flops(token=2.0, scored=3.0, sequence=5.0, pair=7.0)
    work = Work(1, 2, 10, 14, 100, 80, 4, 20.0)
    assert cost.of(work) == 2 * 10 + 3 * 4 + 5 * 2 + 7 * 20
    assert cost.of(work._replace(computed=14, padding=0, unshared=10)) == cost.of(work)


@pytest.mark.parametrize("dtype, each", [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bytes_of_an_update(dtype, each):
    weights = [torch.zeros(3, 5, dtype=dtype, requires_grad=True), torch.zeros(7, dtype=dtype, requires_grad=True)]
    frozen = torch.zeros(100)
    assert update_bytes([*weights, frozen]) == each * 22
    optimizer = torch.optim.AdamW(weights)
    assert state_bytes(optimizer) == 0
    sum(w.sum() for w in weights).backward()
    optimizer.step()
    assert update_bytes(weights, state_bytes(optimizer)) == each * 22
    assert update_bytes(weights, state_bytes(torch.optim.SGD(weights))) == each // 2 * 22
