"""Pairs share their prompt's ids, and each answer ends with the end-of-turn token."""

from __future__ import annotations

import pytest
import torch

from datamodules import PreferenceDataModule
from datamodules.formats import DataError

PAIR = {"question": "What is it?", "chosen": "Paris, I think.\n", "rejected": "No idea"}


@pytest.fixture
def load(write, tokenizer):
    def load(*records, **options):
        options = {"tokenizer": tokenizer} | options
        data = PreferenceDataModule(train=write("a.jsonl", *records), **options)
        data.setup("fit")
        return data.datasets["train"]

    return load


def test_a_pair_is_a_prompt_with_two_branches(load, tokenizer):
    example = load({**PAIR, "system": "Be terse.", "history": [["Hi", "Hello"]]})[0]
    assert tokenizer.decode(example.prefix_ids) == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
        "<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(b.input_ids) for b in example.branches] == [
        "Paris, I think.\n<|im_end|>",
        "No idea<|im_end|>",
    ]
    assert all(torch.all(branch.weights == 1) for branch in example.branches)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen25", "thinks_last", "opens_thinking"])
def test_each_answer_ends_with_one_end_of_turn_token(load, make_tokenizer, family):
    tokenizer = make_tokenizer(family)
    end = {"llama3": "<|eot_id|>", "mistral": "</s>"}.get(family, "<|im_end|>")
    for branch in load(PAIR, tokenizer=tokenizer)[0].branches:
        ids = branch.input_ids.tolist()
        assert tokenizer.decode(ids[-1:]) == end and ids.count(ids[-1]) == 1


def test_margin_and_weight_are_values_where_any_record_has_them(load):
    assert load(PAIR)[0].values == {}
    examples = load(PAIR, {**PAIR, "margin": 0.5}, {**PAIR, "weight": 2})
    assert [example.values for example in examples] == [
        {"margin": 0.0, "weight": 1.0},
        {"margin": 0.5, "weight": 1.0},
        {"margin": 0.0, "weight": 2.0},
    ]


def test_values_have_the_same_keys_on_both_sides_of_a_split(write, tokenizer):
    records = [{**PAIR, "question": str(i)} for i in range(9)] + [{**PAIR, "margin": 1}]
    data = PreferenceDataModule(train=write("a.jsonl", *records), validation=0.5, tokenizer=tokenizer)
    data.setup("fit")
    keys = {tuple(e.values) for split in ("train", "validation") for e in data.datasets[split]}
    assert keys == {("margin",)}


def test_answers_that_the_template_makes_equal_are_refused(load, make_tokenizer):
    calls = ['{"name": "weather", "arguments": {}}', '{"arguments":{},"name":"weather"}']
    chosen, rejected = ({"from": "function_call", "value": call} for call in calls)
    with pytest.raises(DataError, match="answers that are equal once they are rendered"):
        load({"question": "Rain?", "chosen": chosen, "rejected": rejected}, tokenizer=make_tokenizer("qwen25"))


def test_a_prompt_longer_than_the_budget_is_told_as_such(load):
    record = {**PAIR, "question": "word " * 200}
    with pytest.raises(DataError, match=r"a\.jsonl:1: found a prompt of \d+ tokens; expected at most 50"):
        load(record, max_length=50)
    example = load(record, max_length=50, overlong="truncate")[0]
    longest = max(len(branch.input_ids) for branch in example.branches)
    assert len(example.prefix_ids) + longest == 50


def test_pairs_that_a_cut_makes_equal_are_dropped_and_counted(write, tokenizer):
    same = "the same " * 50
    path = write("a.jsonl", PAIR, {"question": "Why?", "chosen": same + "a", "rejected": same + "b"})
    data = PreferenceDataModule(train=path, tokenizer=tokenizer, max_length=40, overlong="truncate")
    data.setup("fit")
    assert data.report.splits["train"].dropped == {"equal answers after a cut": 1}


def test_a_pair_may_be_about_function_calls(load, make_tokenizer):
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'}
    record = {"question": "Rain?", "chosen": call, "rejected": "No", "tools": '[{"name": "weather"}]'}
    tokenizer = make_tokenizer("qwen25")
    example = load(record, tokenizer=tokenizer)[0]
    called = tokenizer.decode(example.branches[0].input_ids)
    assert called == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'
    assert '{"type": "function", "function": {"name": "weather"}}' in tokenizer.decode(example.prefix_ids)
