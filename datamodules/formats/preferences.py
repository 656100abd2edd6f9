"""Pairs of a preferred and a rejected answer to one prompt, in any of these forms.

question + response_chosen + response_rejected   (with system and history)
conversations + chosen + rejected                the answers as text, as a message or as a list of messages
prompt + chosen + rejected                       the same, prompt as text or as messages
chosen + rejected                                whole conversations; what they share is the prompt
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datamodules.formats.conversations import parse_answer
from datamodules.formats.errors import Place, quote
from datamodules.formats.fields import first_field, optional_number, parse_tools
from datamodules.formats.messages import ENDS_PROMPT, Message, check_order
from datamodules.formats.prompts import CONVERSATION_KEYS, QUESTION_KEYS, as_record, prompt_messages


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers.

    Attributes:
        messages: The prompt's turns; the last one is the user's or a tool's.
        chosen: The preferred answer.
        rejected: The other one.
        tools: Function schemas that the assistant may call.
        margin: By how much the reward of the preferred answer should be higher; None = not said.
        weight: Loss weight of the pair, > 0; None = not said.
    """

    messages: tuple[Message, ...]
    chosen: Message
    rejected: Message
    tools: tuple[dict, ...] = ()
    margin: float | None = None
    weight: float | None = None


def parse_preference(record: Any, place: Place) -> Preference:
    """Reads a pair in any of the forms above, with the optional numbers `margin` and `weight`."""
    record = as_record(record, place)
    chosen_key = first_field(record, ("chosen", "response_chosen"), place, "preferred answer")
    rejected_key = first_field(record, ("rejected", "response_rejected"), place, "rejected answer")
    chosen = parse_answer(record[chosen_key], place[chosen_key])
    rejected = parse_answer(record[rejected_key], place[rejected_key])
    if isinstance(record[chosen_key], list) and chosen[0].role in ("system", "user"):
        prompt, chosen, rejected = _split_conversations(record, chosen, rejected, place)
        prompt_place = place[chosen_key]
    else:
        key = first_field(record, (*CONVERSATION_KEYS, *QUESTION_KEYS), place, "prompt")
        prompt, prompt_place = prompt_messages(record, key, place), place[key]
    pair = Preference(
        check_order(prompt, prompt_place, ENDS_PROMPT),
        _one_answer(chosen, place[chosen_key]),
        _one_answer(rejected, place[rejected_key]),
        parse_tools(record.get("tools"), place["tools"]),
        optional_number(record, "margin", place),
        optional_number(record, "weight", place, minimum=0),
    )
    if _said(pair.chosen) == _said(pair.rejected):
        found = f"the same answer as in {chosen_key}"
        raise place[rejected_key].fault("equal answers", found, "two different answers", "Delete the record")
    if pair.weight == 0:
        raise place["weight"].fault("no trained token", "the weight 0", "a weight above 0", "Delete the record")
    return pair


def _one_answer(messages: list[Message], place: Place) -> Message:
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = ", ".join(message.role for message in messages)
        raise place.fault("roles out of order", f"messages of {roles}", "one message of the assistant")
    return messages[0]


def _split_conversations(
    record: dict, chosen: list[Message], rejected: list[Message], place: Place
) -> tuple[list[Message], list[Message], list[Message]]:
    """Cuts two whole conversations where they part; what stands before is the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    stated = record.get("prompt")
    if not prompt:
        found = "two conversations that do not begin alike"
        raise place["rejected"].fault("missing field", found, "the same prompt in both", "Give the field prompt")
    if isinstance(stated, str) and stated.strip() and stated.strip() != prompt[-1].content.strip():
        first = next((message.content for message in prompt if message.role == "user"), "")
        if stated.strip() != first.strip():
            found, expected = quote(stated), "the question that chosen and rejected begin with"
            raise place["prompt"].fault("wrong value", found, expected)
    return prompt, chosen[shared:], rejected[shared:]


def _said(message: Message) -> tuple[str, str]:
    return message.content.strip(), message.calls_text.strip()
