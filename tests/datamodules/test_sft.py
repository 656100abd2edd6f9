"""Which tokens of a conversation weigh how much."""

from __future__ import annotations

import pytest
import torch

from datamodules import SFTDataModule
from datamodules.formats import DataError

TURNS = [("human", "q1"), ("gpt", "one"), ("human", "q2"), ("gpt", "two three")]


def record(weights=(None,) * 4, **more):
    messages = [{"from": role, "value": text} for role, text in TURNS]
    for message, weight in zip(messages, weights, strict=True):
        message |= {} if weight is None else {"weight": weight}
    return {"conversations": messages, **more}


@pytest.fixture
def load(write, tokenizer):
    def load(*records, **options):
        data = SFTDataModule(train=write("a.jsonl", *records), tokenizer=tokenizer, **options)
        data.setup("fit")
        return data.datasets["train"]

    return load


def weighted(tokenizer, example):
    """The text at each weight above 0."""
    branch = example.branches[0]
    values = sorted(set(branch.weights.tolist()) - {0.0})
    return {value: tokenizer.decode(branch.input_ids[branch.weights == value]) for value in values}


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({}, record(), {1.0: "one<|im_end|>two three<|im_end|>"}),
        ({"train_on": "last"}, record(), {1.0: "two three<|im_end|>"}),
        ({}, record((None, 0, None, None)), {1.0: "two three<|im_end|>"}),
        ({}, record((None, 0.5, None, 2)), {0.5: "one<|im_end|>", 2.0: "two three<|im_end|>"}),
        ({}, record((None, 0.5, None, 2), weight=0.5), {0.25: "one<|im_end|>", 1.0: "two three<|im_end|>"}),
        ({"train_on": "last"}, record((None, 5, None, 2)), {2.0: "two three<|im_end|>"}),
        ({}, record((7, None, 7, None)), {1.0: "one<|im_end|>two three<|im_end|>"}),
    ],
)
def test_weights_of_records_and_turns_multiply(load, tokenizer, options, given, expected):
    examples = load(given, **options)
    assert weighted(tokenizer, examples[0]) == expected
    total = sum(weight * len(tokenizer(text)["input_ids"]) for weight, text in expected.items())
    assert examples.trained_weights.tolist() == [pytest.approx(total, abs=1e-6)]
    assert len(examples[0].prefix_ids) == 0 and len(examples[0].branches) == 1


@pytest.mark.parametrize(
    "options, given",
    [
        ({}, record(weight=0)),
        ({}, record((None, 0, None, 0))),
        ({"train_on": "last"}, record((None, None, None, 0))),
    ],
)
def test_a_conversation_without_trained_token_is_refused(load, options, given):
    with pytest.raises(DataError, match=r"a\.jsonl:1: found an example of which no token would be trained"):
        load(given, **options)


def test_a_cut_conversation_begins_late_and_ends_early(load, tokenizer):
    answer, question = "yes " * 100, "so " * 100
    turns = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    whole, cut = load(turns)[0].branches[0], load(turns, overlong="truncate", max_length=64)[0].branches[0]
    first = int(torch.nonzero(whole.weights)[0])
    assert cut.input_ids.tolist() == whole.input_ids[first - 32 : first + 32].tolist()
    assert cut.weights.tolist() == [0.0] * 32 + [1.0] * 32


def test_a_template_that_is_not_prefix_preserving_stops_the_start(make_tokenizer, write):
    data = SFTDataModule(train=write("a.jsonl", record()), tokenizer=make_tokenizer("not_prefix_preserving"))
    with pytest.raises(ValueError, match=r"cannot be used for conversations: .* not prefix-preserving"):
        data.setup("fit")


def test_a_tokenizer_without_template_is_told_in_the_report(make_tokenizer, write):
    data = SFTDataModule(train=write("a.jsonl", record()), tokenizer=make_tokenizer("none"))
    data.setup("fit")
    assert "data, warning: the tokenizer has no chat template: ChatML is used" in str(data.report)
