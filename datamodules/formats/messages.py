"""Messages of a conversation: roles are mapped strictly and stand in an order that a chat can have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datamodules.formats.errors import Place, did_you_mean, quote
from datamodules.formats.fields import number_value, parse_calls, text_value

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}
"""Role names that data may use, and what they mean here."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: The text; may be empty only where `calls` are there.
        calls: Function calls of an assistant, {"name": str, "arguments": dict} each.
        calls_text: The calls as text, for chat templates that know no tools.
        weight: Loss weight of the turn if it is trained; >= 0.
    """

    role: str
    content: str
    calls: tuple[dict, ...] = ()
    calls_text: str = ""
    weight: float = 1.0


FOLLOWERS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user", "call"),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}
"""Which turns may follow which; "call" is an assistant's turn that calls a function."""

ENDS_CONVERSATION = ("assistant", "call")
ENDS_PROMPT = ("user", "tool")


def parse_messages(value: Any, place: Place) -> tuple[Message, ...]:
    """Reads a list of {"from", "value"} or {"role", "content"} objects; their order is not checked here."""
    if not isinstance(value, list):
        raise place.wrong_type(value, "a list of messages")
    if not value:
        raise place.fault("empty field", "an empty list", "a list of messages", "Delete the record")
    return tuple(parse_message(item, place[i]) for i, item in enumerate(value))


def parse_message(value: Any, place: Place) -> Message:
    """Reads one {"from", "value"} or {"role", "content"} object, with its optional "weight" and "tool_calls"."""
    if not isinstance(value, dict):
        raise place.wrong_type(value, 'a message, {"from": ..., "value": ...} or {"role": ..., "content": ...}')
    role_key, text_key = _keys(value, place)
    role = _role(value[role_key], place[role_key])
    content = value.get(text_key)
    if role == "call":
        calls = parse_calls(content, place[text_key])
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        message = Message("assistant", "", calls, text)
    elif role == "assistant" and value.get("tool_calls"):
        calls = parse_calls(value["tool_calls"], place["tool_calls"])
        text = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
        message = Message(
            "assistant", text_value("" if content in (None, []) else content, place[text_key], empty=True), calls, text
        )
    else:
        message = Message(role, text_value(content, place[text_key], empty=role == "system"))
    if value.get("weight") is None:
        return message
    return replace(message, weight=number_value(value["weight"], place["weight"], minimum=0))


def turn(message: Message) -> str:
    """The kind of turn that `FOLLOWERS` speaks of."""
    return "call" if message.calls else message.role


def check_order(messages: Sequence[Message], place: Place, ends: Sequence[str]) -> tuple[Message, ...]:
    """Refuses conversations whose turns do not follow each other as in a chat; an empty system message is left out.

    Args:
        messages: The conversation.
        place: Where it stands.
        ends: The turns that it may end with.
    """
    before = "start"
    for i, message in enumerate(messages):
        now = turn(message)
        if now not in FOLLOWERS[before]:
            found = f"{_name(now)} message {'at the start' if before == 'start' else 'after ' + _name(before)}"
            mend = "A system message can only stand first" if now == "system" else "Delete the record or mend its turns"
            raise place[i].fault("roles out of order", found, _names(FOLLOWERS[before]), mend)
        before = now
    if before not in ends:
        found = f"a conversation that ends with {_name(before)}" if messages else "no message"
        raise place.fault("roles out of order", found, f"one that ends with {_names(ends)}", _end_hint(before, ends))
    return tuple(message for message in messages if message.role != "system" or message.content.strip())


def _keys(value: dict, place: Place) -> tuple[str, str]:
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if role_key in value:
            if text_key not in value and not value.get("tool_calls"):
                raise place.fault("missing field", f'no "{text_key}"', f'"{text_key}" beside "{role_key}"')
            return role_key, text_key
    raise place.fault("missing field", quote(value), 'the fields "from" and "value", or "role" and "content"')


def _role(value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise place.wrong_type(value, "the name of a role")
    if value not in ROLES:
        mend = did_you_mean(value, ROLES)
        raise place.fault(
            "unknown role", f"the role {quote(value).removeprefix('the text ')}", f"one of {', '.join(ROLES)}", mend
        )
    return ROLES[value]


def _name(kind: str) -> str:
    names = {"call": "a function call", "assistant": "an assistant", "start": "nothing", "tool": "an observation"}
    return names.get(kind, f"a {kind}")


def _names(kinds: Sequence[str]) -> str:
    return " or ".join(_name(kind) for kind in kinds)


def _end_hint(before: str, ends: Sequence[str]) -> str:
    if before == "user" and "assistant" in ends:
        return "Delete the unanswered question"
    if before in ENDS_CONVERSATION and "user" in ends:
        return "Delete the last answer: it is what the model is asked for"
    return ""
