"""No sequence of a micro-batch knows of another: not in the packed row, not in the padded rectangle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lit_align.batch import Branch, Example, StepTotals, pack, pad
from lit_align.models import token_logps

TOTALS = StepTotals(1.0, 1.0)
VOCABULARY = 256
LAYOUTS = {"packed": pack, "right": pad, "left": lambda *args: pad(*args, padding_side="left")}


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="packed").float().eval()


@pytest.fixture(scope="module")
def plain(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").double().eval()


@st.composite
def forests(draw):
    """1 to 4 examples with as many branches each; some tokens are not trained."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    branches, has_prefix = draw(st.sampled_from([(1, False), (1, True), (2, True), (3, True)]))

    def ids(low, high):
        return torch.randint(0, VOCABULARY, (draw(st.integers(low, high)),), generator=g)

    def branch():
        tokens = ids(1, 12)
        return Branch(tokens, (torch.rand(len(tokens), generator=g) < 0.7).float())

    def example():
        return Example(ids(1, 9) if has_prefix else ids(0, 0), tuple(branch() for _ in range(branches)))

    return [example() for _ in range(draw(st.integers(1, 4)))]


def laid_out(layout, examples):
    return LAYOUTS[layout](examples, range(len(examples)), TOTALS)


def separate_logps(model, examples):
    """Every sequence alone, in float64, from its own logits."""
    rows = []
    for example in examples:
        for branch in example.branches:
            ids, first = torch.cat([example.prefix_ids, branch.input_ids]), len(example.prefix_ids)
            logps = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            places = [first + t for t in range(len(branch.input_ids)) if branch.weights[t] > 0 and first + t > 0]
            rows += [logps[t - 1, ids[t]] for t in places]
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)


@settings(max_examples=40)
@given(examples=forests(), layout=st.sampled_from(list(LAYOUTS)))
def test_sequences_in_one_batch_are_as_likely_as_alone(model, plain, examples, layout):
    with torch.no_grad():
        found = token_logps(model, laid_out(layout, examples))
        torch.testing.assert_close(found.double(), separate_logps(plain, examples), rtol=0, atol=1e-5)


def others(model, layout, examples, spoiled):
    """Log-probabilities of all sequences but the spoiled ones, and the gradient of a loss on them."""
    batch = laid_out(layout, examples)
    kept = ~torch.isin(batch.scored.sequences, torch.tensor(sorted(spoiled)))
    logps = token_logps(model, batch)[kept]
    model.zero_grad()
    (-(logps * batch.scored.weights[kept]).sum() + logps.square().sum()).backward()
    return logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def spoil(example, which, g):
    """Other tokens in some branches (and, if it is all of them, in the prefix)."""

    def garbage(ids):
        return torch.randint(0, VOCABULARY, ids.shape, generator=g)

    branches = tuple(
        Branch(garbage(b.input_ids), b.weights) if i in which else b for i, b in enumerate(example.branches)
    )
    whole = len(which) == len(branches)
    return Example(garbage(example.prefix_ids) if whole else example.prefix_ids, branches)


@settings(max_examples=40)
@given(examples=forests(), layout=st.sampled_from(list(LAYOUTS)), data=st.data())
def test_garbage_in_a_neighbour_changes_neither_loss_nor_gradient(model, examples, layout, data):
    number = data.draw(st.integers(0, len(examples) - 1))
    count = len(examples[number].branches)
    which = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    spoiled = [spoil(example, which, g) if i == number else example for i, example in enumerate(examples)]
    sequences = {number * count + branch for branch in which}
    clean, clean_gradient = others(model, layout, examples, sequences)
    dirty, dirty_gradient = others(model, layout, spoiled, sequences)
    assert torch.equal(clean, dirty)
    for one, other in zip(clean_gradient, dirty_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
