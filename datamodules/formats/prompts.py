"""What a model is asked, in every form that data has for it.

    conversations | messages     a list of messages that ends with a user or an observation
    prompt                       the same, or the question as text
    question | query             the question as text
    instruction [+ input]        the question as text, and what it is about

with, in each form, an optional `system` text, `history` (pairs [user, assistant], or messages) and `tools`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datamodules.formats.errors import Place
from datamodules.formats.fields import first_field, parse_tools, text_value
from datamodules.formats.messages import ENDS_PROMPT, Message, check_order, parse_messages

CONVERSATION_KEYS = ("conversations", "messages")
QUESTION_KEYS = ("prompt", "question", "query", "instruction")


@dataclass(frozen=True)
class Query:
    """A prompt: messages that end with a user's or a tool's turn.

    Attributes:
        messages: The turns, system first if there is one.
        tools: Function schemas that the model may call.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()


def parse_query(record: Any, place: Place) -> Query:
    """Reads the prompt of a record."""
    record = as_record(record, place)
    key = first_field(record, (*CONVERSATION_KEYS, *QUESTION_KEYS), place, "prompt")
    messages = check_order(prompt_messages(record, key, place), place[key], ENDS_PROMPT)
    return Query(messages, parse_tools(record.get("tools"), place["tools"]))


def as_record(value: Any, place: Place) -> dict:
    """The record as an object; a bare list of messages is a conversation."""
    if isinstance(value, list):
        return {"conversations": value}
    if not isinstance(value, dict):
        raise place.wrong_type(value, "an object (the record)")
    return value


def prompt_messages(record: dict, key: str, place: Place) -> list[Message]:
    """The messages that a record's `system`, `history` and field `key` give, in this order."""
    value = record[key]
    if isinstance(value, list) or key in CONVERSATION_KEYS:
        asked = list(parse_messages(value, place[key]))
    else:
        asked = [Message("user", _question(record, key, place))]
    before = _system(record, asked, place) + _history(record.get("history"), place["history"])
    if before and asked[0].role == "system":
        found = "history, which stands before a system message"
        raise place["history"].fault("roles out of order", found, "the system message first")
    return before + asked


def _question(record: dict, key: str, place: Place) -> str:
    text = text_value(record[key], place[key])
    if key == "instruction" and record.get("input") is not None:
        about = text_value(record["input"], place["input"], empty=True)
        return f"{text}\n{about}" if about.strip() else text
    return text


def _system(record: dict, asked: list[Message], place: Place) -> list[Message]:
    if record.get("system") is None:
        return []
    text = text_value(record["system"], place["system"], empty=True)
    if not text.strip():
        return []
    if asked[0].role == "system":
        found = "a system text beside a system message"
        raise place["system"].fault("roles out of order", found, "one of the two", "Delete the other")
    return [Message("system", text)]


def _history(value: Any, place: Place) -> list[Message]:
    if value is None or value == []:
        return []
    if not isinstance(value, list):
        raise place.wrong_type(value, "a list of [user, assistant] pairs, or of messages")
    if all(isinstance(item, dict) for item in value):
        return list(parse_messages(value, place))
    messages = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise place[i].wrong_type(pair, "a pair [user, assistant]")
        messages.append(Message("user", text_value(pair[0], place[i][0])))
        messages.append(Message("assistant", text_value(pair[1], place[i][1])))
    return messages
