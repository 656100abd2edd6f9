"""Every form of record is read to the same messages."""

from __future__ import annotations

import json

import pytest

from datamodules.formats import (
    DataError,
    Message,
    Place,
    parse_conversation,
    parse_preference,
    parse_query,
    parse_text,
)

HERE = Place("data.jsonl:3")
Q, A, B = Message("user", "发烧?"), Message("assistant", "多喝水"), Message("assistant", "不知道")
SYSTEM = Message("system", "You are terse.")
PAST = (Message("user", "Hi"), Message("assistant", "Hello"))
CALL = {"name": "weather", "arguments": {"city": "x"}}

QUERIES = {
    "question": {"question": "发烧?", "answer": "kept for rewards"},
    "query": {"query": "发烧?"},
    "prompt": {"prompt": "发烧?"},
    "prompt as messages": {"prompt": [{"role": "user", "content": "发烧?"}]},
    "instruction": {"instruction": "发烧?", "input": ""},
    "from and value": {"conversations": [{"from": "human", "value": "发烧?"}]},
    "role and content": {"messages": [{"role": "user", "content": "发烧?"}]},
    "content in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "发烧?"}]}]},
    "a bare list": [{"from": "user", "value": "发烧?"}],
    "empty system, history, tools": {"question": "发烧?", "system": "", "history": [], "tools": ""},
    "nulls": {"question": "发烧?", "system": None, "history": None, "tools": None, "conversations": None},
    "empty system message": {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "发烧?"}]},
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_is_read_from(name):
    assert parse_query(QUERIES[name], HERE).messages == (Q,)


@pytest.mark.parametrize(
    "record",
    [
        {"question": "发烧?", "system": "You are terse.", "history": [["Hi", "Hello"]]},
        {
            "prompt": "发烧?",
            "system": "You are terse.",
            "history": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
        {
            "conversations": [
                {"from": "system", "value": "You are terse."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "发烧?"},
            ]
        },
    ],
)
def test_system_and_history_stand_before_the_question(record):
    assert parse_query(record, HERE).messages == (SYSTEM, *PAST, Q)


def test_an_instruction_is_followed_by_its_input():
    assert parse_query({"instruction": "Translate", "input": "水"}, HERE).messages == (
        Message("user", "Translate\n水"),
    )


CONVERSATIONS = {
    "human and gpt": {"conversations": [{"from": "human", "value": "发烧?"}, {"from": "gpt", "value": "多喝水"}]},
    "user and assistant": {
        "messages": [{"role": "user", "content": "发烧?"}, {"role": "assistant", "content": "多喝水"}]
    },
    "model": {"messages": [{"role": "user", "content": "发烧?"}, {"role": "model", "content": "多喝水"}]},
    "bot": {"conversations": [{"from": "user", "value": "发烧?"}, {"from": "bot", "value": "多喝水"}]},
    "instruction and output": {"instruction": "发烧?", "input": "", "output": "多喝水"},
    "prompt and completion": {"prompt": "发烧?", "completion": "多喝水"},
    "prompt and completion as messages": {
        "prompt": [{"role": "user", "content": "发烧?"}],
        "completion": [{"role": "assistant", "content": "多喝水"}],
    },
    "question and answer": {"question": "发烧?", "answer": "多喝水"},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_read_from(name):
    conversation = parse_conversation(CONVERSATIONS[name], HERE)
    assert (conversation.messages, conversation.weight) == ((Q, A), 1.0)


def test_weights_of_records_and_messages_are_read():
    record = {
        "weight": 0.5,
        "conversations": [
            {"from": "human", "value": "发烧?"},
            {"from": "gpt", "value": "多喝水", "weight": 0},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello", "weight": 2},
        ],
    }
    conversation = parse_conversation(record, HERE)
    assert conversation.weight == 0.5
    assert [message.weight for message in conversation.messages] == [1, 0, 1, 2]


@pytest.mark.parametrize("call", [json.dumps(CALL), CALL, [CALL], json.dumps([CALL])])
def test_function_calls_and_observations_are_read(call):
    turns = [("human", "Rain?"), ("gpt", "I look."), ("function_call", call), ("observation", "yes"), ("gpt", "Yes.")]
    conversation = parse_conversation({"conversations": [{"from": r, "value": v} for r, v in turns]}, HERE)
    assert [m.role for m in conversation.messages] == ["user", "assistant", "assistant", "tool", "assistant"]
    assert conversation.messages[2].calls == (CALL,)
    assert json.loads(conversation.messages[2].calls_text) == json.loads(
        call if isinstance(call, str) else json.dumps(call)
    )


def test_tool_calls_in_the_form_of_openai_are_read_as_the_same():
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}] * 2
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "yes", "tool_call_id": "1"},
        {"role": "tool", "content": "yes", "tool_call_id": "1"},
        {"role": "assistant", "content": "Yes."},
    ]
    schema = {"name": "weather", "parameters": {}}
    for tools in ([schema], json.dumps([schema]), [{"type": "function", "function": schema}]):
        conversation = parse_conversation({"messages": messages, "tools": tools}, HERE)
        assert conversation.messages[1].calls == (CALL, CALL)
        assert conversation.tools == ({"type": "function", "function": schema},)


MESSAGE = {"from": "gpt", "value": "多喝水"}
OTHER = {"role": "assistant", "content": "不知道"}
FIRST = {"role": "user", "content": "发烧?"}
PAIRS = {
    "question, response_chosen": {
        "system": "",
        "history": [],
        "question": "发烧?",
        "response_chosen": "多喝水",
        "response_rejected": "不知道",
    },
    "conversations and texts": {
        "conversations": [{"from": "human", "value": "发烧?"}],
        "chosen": "多喝水",
        "rejected": "不知道",
    },
    "conversations and messages": {
        "conversations": [{"from": "human", "value": "发烧?"}],
        "chosen": MESSAGE,
        "rejected": OTHER,
    },
    "prompt and texts": {"prompt": "发烧?", "chosen": "多喝水", "rejected": "不知道"},
    "prompt and lists": {"prompt": [FIRST], "chosen": [MESSAGE], "rejected": [OTHER]},
    "prompt and parts": {"prompt": "发烧?", "chosen": [{"type": "text", "text": "多喝水"}], "rejected": "不知道"},
    "whole conversations": {"chosen": [FIRST, MESSAGE], "rejected": [FIRST, OTHER]},
    "whole conversations and the prompt": {"prompt": "发烧?", "chosen": [FIRST, MESSAGE], "rejected": [FIRST, OTHER]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_from(name):
    pair = parse_preference(PAIRS[name], HERE)
    assert (pair.messages, pair.chosen, pair.rejected) == ((Q,), A, B)
    assert (pair.margin, pair.weight) == (None, None)


def test_whole_conversations_share_all_turns_up_to_where_they_part():
    past = [FIRST, MESSAGE, {"role": "user", "content": "Hi"}]
    record = {"chosen": [*past, {"role": "assistant", "content": "Hello"}], "rejected": [*past, OTHER]}
    pair = parse_preference(record, HERE)
    assert pair.messages == (Q, A, Message("user", "Hi"))
    assert (pair.chosen.content, pair.rejected) == ("Hello", B)


def test_margin_and_weight_of_a_pair_are_read():
    pair = parse_preference({**PAIRS["prompt and texts"], "margin": -0.5, "weight": 2}, HERE)
    assert (pair.margin, pair.weight) == (-0.5, 2.0)


def test_a_pair_may_answer_an_observation_or_call_a_function():
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "yes"},
    ]
    assert parse_preference({"conversations": turns, "chosen": "a", "rejected": "b"}, HERE).messages[-1].role == "tool"
    call = {"from": "function_call", "value": CALL}
    assert parse_preference({"question": "Rain?", "chosen": call, "rejected": "b"}, HERE).chosen.calls == (CALL,)


def test_text_is_read_as_it_is():
    assert parse_text({"text": " a\n", "meta": 1}, HERE) == " a\n"


ONE = {"from": "human", "value": "a"}
TWO = {"from": "gpt", "value": "b"}
FAULTS = [
    # parser, record, field, reason, words of the message
    (parse_text, {"txt": "a"}, "", "missing field", r"no text; expected one of the fields text\. The record has: txt"),
    (parse_text, {"text": " \n"}, "text", "empty field", "a text of blanks alone"),
    (parse_text, {"text": 3}, "text", "wrong type", r"a number \(3\); expected text"),
    (parse_text, ["a"], "", "wrong type", "a list"),
    (parse_text, {"text": "a\x00b"}, "text", "NUL character", "at position 2"),
    (parse_text, {"text": "a\ud800"}, "text", "lone surrogate", "half of a surrogate pair .* at position 2"),
    (parse_conversation, 5, "", "wrong type", "a number"),
    (parse_conversation, {}, "", "missing field", "no conversation; .* The record has: nothing"),
    (parse_conversation, {"conversations": "a"}, "conversations", "wrong type", "a list of messages"),
    (parse_conversation, {"question": "a"}, "", "missing field", "no answer; expected one of the fields completion"),
    (parse_conversation, {"conversations": []}, "conversations", "empty field", "an empty list"),
    (
        parse_conversation,
        {"conversations": ["a"]},
        "conversations[0]",
        "wrong type",
        'the text "a"; expected a message',
    ),
    (parse_conversation, {"conversations": [{"from": "human"}]}, "conversations[0]", "missing field", 'no "value"'),
    (
        parse_conversation,
        {"conversations": [{"value": "a"}]},
        "conversations[0]",
        "missing field",
        '"from" and "value"',
    ),
    (
        parse_conversation,
        {"conversations": [{"from": "gtp", "value": "a"}]},
        "conversations[0].from",
        "unknown role",
        r'the role "gtp"; expected one of system, human, user, .*Did you mean "gpt"\?',
    ),
    (parse_conversation, {"conversations": [{"from": 1, "value": "a"}]}, "conversations[0].from", "wrong type", "role"),
    (
        parse_conversation,
        {"conversations": [ONE, {"from": "gpt", "value": ""}]},
        "conversations[1].value",
        "empty field",
        "an empty text",
    ),
    (
        parse_conversation,
        {"conversations": [ONE, {"from": "gpt", "value": None}]},
        "conversations[1].value",
        "wrong type",
        "null; expected text",
    ),
    (
        parse_conversation,
        {"conversations": [TWO, ONE]},
        "conversations[0]",
        "roles out of order",
        "an assistant message",
    ),
    (parse_conversation, {"conversations": [ONE, ONE, TWO]}, "conversations[1]", "roles out of order", "after a user"),
    (
        parse_conversation,
        {"conversations": [ONE, {"from": "system", "value": "s"}, TWO]},
        "conversations[1]",
        "roles out of order",
        "a system message after a user; .* can only stand first",
    ),
    (
        parse_conversation,
        {"conversations": [ONE, {"from": "observation", "value": "s"}, TWO]},
        "conversations[1]",
        "roles out of order",
        "an observation message after a user; expected an assistant or a function call",
    ),
    (
        parse_conversation,
        {"conversations": [ONE, TWO, ONE]},
        "conversations",
        "roles out of order",
        "ends with a user; .* Delete the unanswered question",
    ),
    (
        parse_conversation,
        {"conversations": [ONE, {"from": "function_call", "value": "{oops"}]},
        "conversations[1].value",
        "invalid JSON",
        "invalid JSON",
    ),
    (
        parse_conversation,
        {"conversations": [ONE, {"from": "function_call", "value": '{"arguments": {}}'}]},
        "conversations[1].value",
        "wrong type",
        "expected a function call",
    ),
    (
        parse_conversation,
        {"conversations": [ONE, TWO], "tools": {}},
        "tools",
        "wrong type",
        "a list of function schemas",
    ),
    (parse_conversation, {"conversations": [ONE, TWO], "tools": [{}]}, "tools[0]", "wrong type", "a function schema"),
    (
        parse_conversation,
        {"conversations": [ONE, TWO], "weight": "x"},
        "weight",
        "wrong type",
        "a number of at least 0",
    ),
    (parse_conversation, {"conversations": [ONE, TWO], "weight": -1}, "weight", "wrong value", "at least 0"),
    (parse_conversation, {"conversations": [ONE, TWO], "weight": True}, "weight", "wrong type", "a boolean"),
    (
        parse_conversation,
        {"conversations": [ONE, {**TWO, "weight": float("nan")}]},
        "conversations[1].weight",
        "wrong value",
        "nan",
    ),
    (parse_query, {"conversations": [ONE, TWO]}, "conversations", "roles out of order", "Delete the last answer"),
    (parse_query, {"question": ""}, "question", "empty field", "an empty text"),
    (parse_query, {"question": ["a"]}, "question[0]", "wrong type", "expected a message"),
    (parse_query, {"question": "a", "history": "b"}, "history", "wrong type", "pairs"),
    (parse_query, {"question": "a", "history": [["b"]]}, "history[0]", "wrong type", "a pair"),
    (parse_query, {"question": "a", "history": [["b", ""]]}, "history[0][1]", "empty field", "an empty text"),
    (parse_query, {"question": "a", "system": 1}, "system", "wrong type", "a number"),
    (
        parse_query,
        {"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]},
        "system",
        "roles out of order",
        "a system text beside a system message",
    ),
    (
        parse_preference,
        {"question": "a"},
        "",
        "missing field",
        "no preferred answer; expected one of the fields chosen",
    ),
    (parse_preference, {"question": "a", "chosen": "b"}, "", "missing field", "no rejected answer"),
    (parse_preference, {"chosen": "a", "rejected": "b"}, "", "missing field", "no prompt"),
    (parse_preference, {"question": "a", "chosen": "", "rejected": "b"}, "chosen", "empty field", "an empty text"),
    (
        parse_preference,
        {"question": "a", "chosen": "b", "rejected": "b "},
        "rejected",
        "equal answers",
        "the same answer",
    ),
    (
        parse_preference,
        {"question": "a", "response_chosen": "b", "response_rejected": "b"},
        "response_rejected",
        "equal answers",
        "the same answer as in response_chosen",
    ),
    (
        parse_preference,
        {"question": "a", "chosen": ONE, "rejected": "b"},
        "chosen",
        "roles out of order",
        "messages of user",
    ),
    (
        parse_preference,
        {"question": "a", "chosen": [TWO, ONE], "rejected": "b"},
        "chosen",
        "roles out of order",
        "messages of assistant, user",
    ),
    (
        parse_preference,
        {"chosen": [ONE, TWO], "rejected": [{**ONE, "value": "z"}, TWO]},
        "rejected",
        "missing field",
        "do not begin alike",
    ),
    (
        parse_preference,
        {"prompt": "z", "chosen": [ONE, TWO], "rejected": [ONE, {**TWO, "value": "z"}]},
        "prompt",
        "wrong value",
        "the question that chosen and rejected begin with",
    ),
    (
        parse_preference,
        {"question": "a", "chosen": "b", "rejected": "c", "weight": 0},
        "weight",
        "no trained token",
        "0",
    ),
    (
        parse_preference,
        {"question": "a", "chosen": "b", "rejected": "c", "margin": "x"},
        "margin",
        "wrong type",
        "number",
    ),
]


@pytest.mark.parametrize(("parse", "record", "field", "reason", "words"), FAULTS)
def test_a_fault_names_place_field_and_what_was_expected(parse, record, field, reason, words):
    with pytest.raises(DataError, match=words) as caught:
        parse(record, HERE)
    assert (caught.value.origin, caught.value.field, caught.value.reason) == ("data.jsonl:3", field, reason)
    assert str(caught.value).startswith("data.jsonl:3: " + (field + ": found " if field else "found "))
    assert "expected" in str(caught.value)
