"""A trunk that cannot take a packed row gets a padded rectangle, and nobody after it can tell."""

import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_align.batch import Segment, StepTotals, pack, pad
from lit_align.models import hidden_states, scalar_at_ends, scalar_at_sources, token_logps, unpacking
from lit_align.models.unpacking import rectangle
from tests.models.architectures import ARCHITECTURES, alone, build, forest

TOTALS = StepTotals(1.0, 1.0)
LLAMA = ARCHITECTURES[0]


@pytest.fixture
def examples():
    return forest(torch.Generator().manual_seed(1))


def test_each_branch_has_a_row_with_its_prefix_before_it():
    segments = (Segment(0, 2), Segment(2, 5, 0, 2), Segment(5, 6, 0, 2), Segment(6, 8))
    found = rectangle(segments)
    assert found.sources.tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 0, 0], [6, 7, 0, 0, 0]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert found.places.tolist() == [0, 1, 2, 3, 4, 7, 10, 11]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attentions_take_packed_batches_and_say_so_once(attention, examples, caplog):
    unpacking.tell_unpacked.cache_clear()
    model, plain, batch = build(LLAMA, attention), build(LLAMA, "eager"), pack(examples, range(3), TOTALS)
    with caplog.at_level(logging.WARNING):
        found = token_logps(model, batch)
        token_logps(model, batch)
    expected = alone(plain, examples)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    (said,) = [record.getMessage() for record in caplog.records if "padded before its trunk" in record.getMessage()]
    assert "LlamaModel" in said and repr(attention) in said
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_hidden_states_stand_where_the_packed_row_has_them(examples):
    batch = pack(examples, range(3), TOTALS)
    packed, padded = hidden_states(build(LLAMA, "packed"), batch), hidden_states(build(LLAMA, "sdpa"), batch)
    assert packed.shape == padded.shape == (batch.input_ids.numel(), 32)
    torch.testing.assert_close(padded, packed, rtol=1e-5, atol=1e-5)


def test_scalars_and_empty_batches_go_the_same_way(examples):
    torch.manual_seed(0)
    config = build(LLAMA, "sdpa").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    packed, padded = (layout(examples, range(3), TOTALS) for layout in (pack, pad))
    torch.testing.assert_close(scalar_at_ends(model, packed), scalar_at_ends(model, padded), rtol=0, atol=1e-6)
    torch.testing.assert_close(scalar_at_sources(model, packed), scalar_at_sources(model, padded), rtol=0, atol=1e-6)
    assert token_logps(build(LLAMA, "sdpa"), pack([], [], TOTALS)).shape == (0,)
