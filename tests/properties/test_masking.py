"""Trained are the assistant's tokens, all of them, with the token that ends the turn, and no others.

The oracle decodes the tokens of each weight and compares them with what the record's author wrote as answers. Every
answer of a conversation has a weight of its own, so its tokens are told from all others by their weight.
"""

from __future__ import annotations

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import PreferenceDataModule, SFTDataModule
from datamodules.store import Guard

FAMILIES = ["chatml", "none", "llama3", "qwen25", "mistral", "thinks_last", "opens_thinking", "no_generation_prompt",
            "blank_header", "markers"]  # fmt: skip
KNOWS_TOOLS = {"qwen25"}
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00<"), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
names = st.text("abc_", min_size=1, max_size=5)
calls = st.builds(lambda name, value: {"name": name, "arguments": {"x": value}}, names, texts)


@st.composite
def conversations(draw, family):
    """Turns (role, text or calls) in any order that a chat can have; they end with an answer or a call."""
    plain = family == "mistral"  # its template refuses all but users and assistants
    turns = [("system", draw(texts))] if not plain and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(("user", draw(texts)))
        if not plain and draw(st.booleans()):
            if family != "thinks_last" and draw(st.booleans()):  # where two answers in a row change the first
                turns.append(("assistant", draw(texts)))
            for _ in range(draw(st.integers(1, 2))):
                turns += [("call", draw(calls)), ("tool", draw(texts))]
        turns.append(("assistant", draw(texts)))
    if not plain and draw(st.booleans()):
        turns += [("user", draw(texts)), ("call", draw(calls))]
    return turns


def as_record(turns, weights, record_weight, openai):
    """The record in either spelling."""
    role_key, text_key = ("role", "content") if openai else ("from", "value")
    names = {"call": "function_call", "tool": "observation"}
    messages = []
    for i, (role, content) in enumerate(turns):
        text = json.dumps(content, ensure_ascii=False) if role == "call" else content
        messages.append(
            {role_key: names.get(role, role), text_key: text} | ({"weight": weights[i]} if i in weights else {})
        )
    return {"messages" if openai else "conversations": messages, "weight": record_weight}


def written(family, role, content, last):
    """What the model has to write for an answer, end of turn included."""
    end = {"llama3": "<|eot_id|>", "mistral": "</s>"}.get(family, "<|im_end|>")
    if role == "call":
        call = json.dumps(content, ensure_ascii=False)
        content = f"<tool_call>\n{call}\n</tool_call>" if family in KNOWS_TOOLS else call
    if family == "thinks_last" and last:
        content = "<think>\n\n</think>\n\n" + content
    if family == "llama3":
        content = content.strip()
    return (" " if family == "mistral" else "") + content + end


def runs(tokenizer, ids, weights):
    """The text of each run of equal weight above 0."""
    pairs = groupby(zip(ids.tolist(), weights.tolist(), strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([i for i, _ in group]), weight) for weight, group in pairs if weight > 0]


def same(family, found, expected):
    """Equal; a first token may hold the blanks that the template writes before an answer, too."""
    if found == expected:
        return True
    may_join = family == "blank_header" or expected[:1].isspace()
    return may_join and found.lstrip() == expected.lstrip()


@pytest.fixture(scope="module")
def guards(make_tokenizer):
    cache = {}

    def get(kind, family, **options):
        key = (kind, family, *options.items())
        if key not in cache:
            data = kind(tokenizer=make_tokenizer(family), max_length=4000, **options)
            cache[key] = Guard(data.encoder(), "raise"), data.tokenizer
        return cache[key]

    return get


def encode(guard, record):
    row = guard({"text": json.dumps(record), "origin": "a.jsonl:1", "continues": False, "source": 0})
    assert row["fault"] == "" and row["cut"] == ""
    return row


@settings(max_examples=100)
@given(
    data=st.data(), family=st.sampled_from(FAMILIES), train_on=st.sampled_from(["all", "last"]), openai=st.booleans()
)
def test_the_trained_tokens_are_the_answers_with_their_end_of_turn(guards, data, family, train_on, openai):
    turns = data.draw(conversations(family))
    answers = [i for i, (role, _) in enumerate(turns) if role in ("assistant", "call")]
    silent = data.draw(st.sets(st.sampled_from(answers[:-1]))) if len(answers) > 1 else set()
    weights = {i: 0 if i in silent else 2.0**-n for n, i in enumerate(answers)}
    weights |= {i: 5 for i in range(len(turns)) if i not in answers and data.draw(st.booleans())}  # of no effect
    record_weight = data.draw(st.sampled_from([1, 0.5, 3]))
    guard, tokenizer = guards(SFTDataModule, family, train_on=train_on)
    row = encode(guard, as_record(turns, weights, record_weight, openai))
    trained = [i for i in (answers if train_on == "all" else answers[-1:]) if i not in silent]
    expected = [(written(family, *turns[i], i == len(turns) - 1), weights[i] * record_weight) for i in trained]
    found = runs(tokenizer, row["input_ids"], row["weights"])
    assert [weight for _, weight in found] == [weight for _, weight in expected]
    for (text, _), (want, _) in zip(found, expected, strict=True):
        assert same(family, text, want), (text, want)
    assert row["trained"] == float(row["weights"].astype("float64").sum()) and row["weights"][0] == 0


@settings(max_examples=60)
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_both_answers_of_a_pair_are_what_was_written_after_the_same_prompt(guards, data, family):
    turns = [turn for turn in data.draw(conversations(family))]
    while turns[-1][0] not in ("user", "tool"):
        turns.pop()
    chosen, rejected = data.draw(st.lists(texts, min_size=2, max_size=2, unique_by=str.strip))
    guard, tokenizer = guards(PreferenceDataModule, family)
    record = as_record(turns, {}, 1, openai=False) | {"chosen": chosen, "rejected": rejected}
    row = encode(guard, record)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        want = written(family, "assistant", text, last=True)
        assert same(family, tokenizer.decode(row[f"{name}_ids"]), want)
    assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
    assert turns[-1][1].strip() in row["prompt"]
