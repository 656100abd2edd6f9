"""What is registered as "packed": padded batches, generation, soft caps, what is refused."""

import pytest
import torch

from lit_align.batch import StepTotals, pack, pad
from lit_align.models import attention, token_logps
from lit_align.models.varlen import varlen_attention
from tests.models.architectures import ARCHITECTURES, alone, build, forest
from tests.models.dense_attention import packed_row

TOTALS = StepTotals(1.0, 1.0)
BY_TYPE = {architecture.model_type: architecture for architecture in reversed(ARCHITECTURES)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_soft_capped_scores_serve_padded_batches_too(side):
    examples = forest(torch.Generator().manual_seed(1))
    model, plain = build(BY_TYPE["gemma2"], "packed"), build(BY_TYPE["gemma2"], "eager")
    found = token_logps(model, pad(examples, range(3), TOTALS, padding_side=side))
    torch.testing.assert_close(found.double(), alone(plain, examples), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_soft_capped_scores_serve_generation_too(cache):
    prompts = torch.randint(3, 61, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"attention_mask": mask, "cache_implementation": cache, "disable_compile": True}
    packed, eager = (build(BY_TYPE["gemma2"], name) for name in ("packed", "eager"))
    assert torch.equal(packed.generate(prompts, **options), eager.generate(prompts, **options))


def test_soft_capped_scores_have_no_dropout():
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    with pytest.raises(ValueError, match="attention_dropout: 0"):
        attention.packed_attention(torch.nn.Module(), *tensors, None, softcap=1.0, dropout=0.1)


@pytest.mark.parametrize("name", attention.UNKNOWN)
def test_what_packed_rows_have_no_form_of_is_refused(name):
    tensors, varlen = [torch.zeros(1, 2, 3, 4)] * 3, packed_row((0, 3)).varlen
    with pytest.raises(ValueError, match=name):
        attention.packed_attention(torch.nn.Module(), *tensors, None, varlen=varlen, **{name: torch.zeros(2)})


def test_a_model_that_does_not_hand_the_row_on_is_found():
    model = build(BY_TYPE["nemotron"], "packed")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("packed")
    with pytest.raises(ValueError, match="attention: sdpa"):
        token_logps(model, pack(forest(torch.Generator().manual_seed(1)), range(3), TOTALS))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_whole_model_with_variable_lengths_equals_its_sequences_alone(model_type, checkpointing, monkeypatch):
    """The way that a GPU goes, with slow kernels behind torch's own operators."""
    from tests.models.dense_attention import register_cpu_kernels

    register_cpu_kernels()
    calls = []

    def variable(query, key, value, varlen, scores, dropout):
        calls.append(len(varlen.spans))
        return varlen_attention(query, key, value, varlen, scores.scale, scores.window)

    monkeypatch.setattr(attention, "_packed", variable)
    examples = forest(torch.Generator().manual_seed(1))
    model, plain = build(BY_TYPE[model_type], "packed"), build(BY_TYPE[model_type], "eager")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found, expected = token_logps(model, pack(examples, range(3), TOTALS)), alone(plain, examples)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert calls == [6, 6] * (2 if checkpointing else 1)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
