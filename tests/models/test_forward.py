"""The packed row, the padded rectangle and separate sequences give the same log-probabilities and gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.batch import Branch, Example, StepTotals, pack, pad
from lit_align.models import (
    hidden_states,
    logits,
    scalar_at_ends,
    scalar_at_sources,
    sequence_lengths,
    sequence_sums,
    token_logps,
    token_stats,
)

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma": {},
    "gemma3_text": {"sliding_window": 5},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "cohere": {},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}
TOTALS = StepTotals(1.0, 1.0)


def tiny(family: str, attention: str = "packed", auto=AutoModelForCausalLM, **extra):
    torch.manual_seed(0)
    options = FAMILIES[family].copy()
    model_type = options.pop("model_type", family)
    config = AutoConfig.for_model(
        model_type, **({"vocab_size": VOCABULARY, "pad_token_id": 0} if family == "gpt2" else COMMON) | options | extra
    )
    return auto.from_config(config, attn_implementation=attention).float().eval()


def example(prefix: int, *sizes: int, generator: torch.Generator) -> Example:
    def ids(n: int) -> torch.Tensor:
        return torch.randint(1, VOCABULARY, (n,), generator=generator)

    branches = tuple(Branch(ids(n), (torch.arange(n) % 4 != 2).float() * 0.5) for n in sizes)
    return Example(ids(prefix), branches, {"margin": float(prefix)})


@pytest.fixture
def pairs() -> list[Example]:
    g = torch.Generator().manual_seed(1)
    return [example(5, 7, 3, generator=g), example(1, 1, 9, generator=g), example(9, 2, 2, generator=g)]


@pytest.fixture
def documents() -> list[Example]:
    g = torch.Generator().manual_seed(2)
    return [example(0, n, generator=g) for n in (7, 1, 12)]


def separate_logps(model, examples: list[Example]) -> torch.Tensor:
    """Each sequence through the model alone; log-probabilities from its own logits."""
    rows = []
    for item in examples:
        for branch in item.branches:
            ids = torch.cat([item.prefix_ids, branch.input_ids])
            logps = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            offset = len(item.prefix_ids)
            rows += [
                logps[offset + t - 1, int(branch.input_ids[t])]
                for t in range(len(branch.input_ids))
                if branch.weights[t] > 0 and offset + t > 0
            ]
    return torch.stack(rows)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["pairs", "documents"])
def test_packed_equals_separate_sequences(family, kind, request):
    examples = request.getfixturevalue(kind)
    model, plain = tiny(family), tiny(family, "sdpa")
    expected = separate_logps(plain, examples)
    got = token_logps(model, pack(examples, range(3), TOTALS))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
    want = gradients(plain, expected.square().sum().float())
    have = gradients(model, got.square().sum())
    assert have.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(have[name], want[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_packed_on_either_side(family, side, pairs):
    model = tiny(family)
    packed, padded = pack(pairs, range(3), TOTALS), pad(pairs, range(3), TOTALS, padding_side=side)
    torch.testing.assert_close(token_logps(model, padded), token_logps(model, packed), rtol=0, atol=2e-6)
    assert packed.num_tokens == padded.num_tokens == sum(len(e) for e in pairs)
    for name in ("targets", "sequences", "weights"):
        assert torch.equal(getattr(packed.scored, name), getattr(padded.scored, name))


def test_garbage_in_a_neighbour_changes_neither_values_nor_gradients(pairs):
    model = tiny("llama")
    other = [pairs[0], Example(pairs[1].prefix_ids.flip(0) * 0 + 3, pairs[1].branches, pairs[1].values), pairs[2]]
    rows = pack(pairs, range(3), TOTALS).scored.sequences < 2  # the first example's two branches
    first = token_logps(model, pack(pairs, range(3), TOTALS))[rows]
    second = token_logps(model, pack(other, range(3), TOTALS))[rows]
    assert torch.equal(first, second)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(model, first.sum()).values(), gradients(model, second.sum()).values(), strict=True)
        if a.shape[0] != VOCABULARY
    )


def test_temperature_divides_the_logits(pairs):
    model, batch = tiny("llama"), pack(pairs, range(3), TOTALS)
    hidden = hidden_states(model, batch)[batch.scored.sources]
    scaled = model.lm_head(hidden).double() / 0.7
    want = scaled.log_softmax(-1).gather(-1, batch.scored.targets[:, None])[:, 0]
    stats = token_stats(model, batch, temperature=0.7)
    torch.testing.assert_close(stats.logps.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        stats.entropy.double(), torch.distributions.Categorical(logits=scaled).entropy(), rtol=0, atol=1e-6
    )
    assert torch.equal(stats.correct.bool(), scaled.argmax(-1) == batch.scored.targets)


def test_entropy_has_a_gradient_only_when_asked_for(pairs):
    model, batch = tiny("llama"), pack(pairs, range(3), TOTALS)
    assert not token_stats(model, batch).entropy.requires_grad
    stats = token_stats(model, batch, entropy_gradient=True)
    hidden = hidden_states(model, batch)[batch.scored.sources]
    plain = torch.distributions.Categorical(logits=model.lm_head(hidden)).entropy()
    want = gradients(model, plain.sum())
    for name, grad in gradients(model, stats.entropy.sum()).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-5)


def test_a_micro_batch_without_scored_tokens_reaches_every_parameter_with_zeros():
    model = tiny("llama")
    for batch in (pack([], [], TOTALS), pad([], [], TOTALS)):
        logps = token_logps(model, batch)
        assert logps.shape == (0,)
        grads = gradients(model, logps.sum())
        assert grads.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_sums_and_lengths_per_sequence(pairs):
    batch = pack(pairs, range(3), TOTALS)
    lengths = [float(sum(b.weights > 0)) for e in pairs for b in e.branches]
    assert sequence_lengths(batch).tolist() == lengths
    assert sequence_sums(torch.ones(len(batch.scored)), batch).tolist() == lengths
    small = torch.full((len(batch.scored),), 1e-9)
    small[0] = 1000.0
    lost_in_float32 = sequence_sums(small, batch)[0] - 1000
    assert float(lost_in_float32) == pytest.approx((lengths[0] - 1) * 1e-9, rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_scalar_head_reads_the_last_real_token_even_if_it_looks_like_padding(side, pairs):
    model = tiny("llama", auto=AutoModelForSequenceClassification, num_labels=1)
    last_is_pad = [
        Example(
            e.prefix_ids,
            tuple(
                Branch(torch.cat([b.input_ids, torch.tensor([0])]), torch.ones(len(b.input_ids) + 1))
                for b in e.branches
            ),
        )
        for e in pairs
    ]
    make = pack if side is None else lambda *a: pad(*a, padding_side=side)
    batch = make(last_is_pad, range(3), TOTALS)
    want = []
    for e in last_is_pad:
        for b in e.branches:
            hidden = model.model(input_ids=torch.cat([e.prefix_ids, b.input_ids])[None]).last_hidden_state[0, -1]
            want.append(model.score(hidden)[0])
    torch.testing.assert_close(scalar_at_ends(model, batch), torch.stack(want), rtol=0, atol=1e-6)
    assert scalar_at_sources(model, batch).shape == batch.scored.targets.shape


def test_generation_is_untouched_by_the_packed_attention():
    prompts = torch.randint(1, VOCABULARY, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(tiny("llama").generate(prompts, **options), tiny("llama", "sdpa").generate(prompts, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_batches_under_another_attention_are_refused(attention, pairs):
    with pytest.raises(ValueError, match="layout: padded"):
        token_logps(tiny("llama", attention), pack(pairs, range(3), TOTALS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_known_for_every_family_here(family):
    logits.check_head(tiny(family))


def test_a_head_with_unknown_post_processing_is_refused(monkeypatch):
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(ValueError, match="post-processes its logits"):
        logits.check_head(model)
