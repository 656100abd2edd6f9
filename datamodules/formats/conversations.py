"""Conversations to imitate (SFT) and plain text (pre-training)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datamodules.formats.errors import Place
from datamodules.formats.fields import first_field, optional_number, parse_tools, text_value
from datamodules.formats.messages import ENDS_CONVERSATION, Message, check_order, parse_message, parse_messages
from datamodules.formats.prompts import CONVERSATION_KEYS, QUESTION_KEYS, as_record, prompt_messages

ANSWER_KEYS = ("completion", "output", "response", "answer")


@dataclass(frozen=True)
class Conversation:
    """Turns of which the assistant's are imitated.

    Attributes:
        messages: The turns; the last one is the assistant's.
        tools: Function schemas that the assistant may call.
        weight: Loss weight of the whole record; > 0.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    weight: float = 1.0


def parse_conversation(record: Any, place: Place) -> Conversation:
    """Reads `conversations` or `messages`, or a prompt in any form beside its answer (`ANSWER_KEYS`)."""
    record = as_record(record, place)
    key = first_field(record, (*CONVERSATION_KEYS, *QUESTION_KEYS), place, "conversation")
    messages = prompt_messages(record, key, place)
    if key not in CONVERSATION_KEYS:
        answer = first_field(record, ANSWER_KEYS, place, "answer")
        messages += parse_answer(record[answer], place[answer])
        place_of_turns = place
    else:
        place_of_turns = place[key]
    weight = optional_number(record, "weight", place, minimum=0)
    return Conversation(
        check_order(messages, place_of_turns, ENDS_CONVERSATION),
        parse_tools(record.get("tools"), place["tools"]),
        1.0 if weight is None else weight,
    )


def parse_answer(value: Any, place: Place) -> list[Message]:
    """The answer to a prompt: text, one message, or a list of messages."""
    if isinstance(value, dict):
        return [parse_message(value, place)]
    if isinstance(value, list) and not (value and isinstance(value[0], dict) and "type" in value[0]):
        return list(parse_messages(value, place))
    return [Message("assistant", text_value(value, place))]


def parse_text(record: Any, place: Place) -> str:
    """The document of a record: its field `text`."""
    if not isinstance(record, dict):
        raise place.wrong_type(record, 'an object with the field "text"')
    return text_value(record[first_field(record, ("text",), place, "text")], place["text"])
