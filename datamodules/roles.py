"""Whose each token of an example is: found by rendering the record's messages one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.formats import (
    Message,
    Place,
    Source,
    parse_conversation,
    parse_preference,
    parse_query,
    read,
)
from datamodules.formats.fields import parse_json
from datamodules.lengths import PAIR
from datamodules.templates import ANSWER, QUESTION

if TYPE_CHECKING:
    from datamodules.templates import ChatTemplate

TEMPLATE = "template"
"""The role of what a template writes by itself: a default system text, a token that begins every text."""


def records_at(sources: Sequence[Source], origins: Iterable[str]) -> dict[str, Any]:
    """The records that stand at these places, by place.

    Args:
        sources: Where to read.
        origins: "file:line" of each.
    """
    wanted, found = set(origins), {}
    for raw in read(sources, lambda fault: None):
        if raw.origin in wanted:
            found[raw.origin] = parse_json(raw.text, Place(raw.origin))
        if len(found) == len(wanted):
            break
    return found


def roles_of(
    template: ChatTemplate, columns: Iterable[str], record: Any, ids: Sequence[int], place: Place
) -> list[str]:
    """The role of each token of the part of an example that messages make.

    Args:
        template: What rendered the record.
        columns: Names of the columns of the rows: they say what kind of record it is.
        record: The record.
        ids: Token ids of the conversation (of pairs and queries: of the prompt), cut or whole.
        place: Where the record stands.

    Returns:
        "system", "user", "assistant", "tool" or "template" for each token, with "/" between them where it cannot be
        told which; "" for all where nothing can be told.
    """
    messages, tools, generation = _messages(set(columns), record, place)
    text = template.render(messages, tools, generation=generation)
    encoding = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = _find(np.array(encoding["input_ids"]), np.array(ids))
    if start is None:
        return [""] * len(ids)
    spans = _spans(template, messages, tools, text)
    stops, names = [stop for stop, _ in spans], [name for _, name in spans]
    offsets = encoding["offset_mapping"][start : start + len(ids)]
    return [names[min(bisect_right(stops, first), len(names) - 1)] for first, _ in offsets]


def _messages(columns: set[str], record: Any, place: Place) -> tuple[Sequence[Message], Sequence[dict], bool]:
    """The messages that a record's row is made of, its tools, and whether an answer is asked for."""
    if set(PAIR) <= columns:
        pair = parse_preference(record, place)
        return pair.messages, pair.tools, True
    if "prompt_ids" in columns:
        query = parse_query(record, place)
        return query.messages, query.tools, True
    conversation = parse_conversation(record, place)
    return conversation.messages, conversation.tools, False


def _find(whole: np.ndarray, part: np.ndarray) -> int | None:
    """Where `part` stands in `whole`, the last place if there are several (a cut keeps the end of a prompt)."""
    if not 0 < len(part) <= len(whole):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
    hits = np.flatnonzero((windows == part).all(axis=1))
    return int(hits[-1]) if len(hits) else None


def _spans(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[dict], text: str
) -> list[tuple[int, str]]:
    """Where each message's text ends and whose it is; what follows the last one asks the assistant."""
    spans: list[tuple[int, str]] = []
    pending: list[str] = []
    for i, message in enumerate(messages, start=1):
        pending.append(message.role)
        before = _rendered(template, messages[:i], tools)
        if before is not None and text.startswith(before) and len(before) > (spans[-1][0] if spans else 0):
            spans.append((len(before), "/".join(dict.fromkeys(pending))))
            pending = []
    if pending:  # the last message is changed by what follows it
        spans.append((len(text), "/".join(dict.fromkeys([*pending, "assistant"]))))
    lead = _lead(template, messages[0], text[: spans[0][0]]) if spans[0][1] == messages[0].role else 0
    return [(lead, TEMPLATE)] * (lead > 0) + spans + [(len(text), "assistant")]


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[dict] = ()) -> str | None:
    """The text of messages; None where the template refuses a conversation that stops there."""
    from jinja2 import TemplateError

    try:
        return template.render(messages, tools)
    except TemplateError:
        return None


def _lead(template: ChatTemplate, message: Message, text: str) -> int:
    """Characters that the template writes by itself before a first message of the user."""
    before = _rendered(template, [QUESTION, ANSWER])
    after = _rendered(template, [QUESTION, ANSWER, QUESTION])
    if message.role != "user" or before is None or after is None or not after.startswith(before):
        return 0
    header = after[len(before) :].partition(QUESTION.content)[0]
    return max(text.find(header + content) for content in (message.content, message.content.strip()))
