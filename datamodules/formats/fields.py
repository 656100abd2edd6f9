"""Single fields of a record, read strictly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datamodules.formats.errors import DataError, Place, field_names, quote

MAX_DEPTH = 100
"""Lists and objects within each other that a record may hold: all that reads or renders it later gets along with it."""

LARGEST = 1e6
"""The largest number of a record that means anything: products of two still fit in float32."""


def parse_json(text: str, place: Place) -> Any:
    """The JSON value in `text`; invalid JSON is a fault that says where it breaks."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateField as error:
        found, mend = f"the field {quote(str(error)).removeprefix('the text ')} twice in one object", "Delete one"
        raise place.fault("duplicate field", found, "every field once", mend) from None
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 20, 0) : error.pos + 20]
        found = f"invalid JSON ({error.msg} at character {error.pos + 1}, near {near!a})"
        raise place.fault("invalid JSON", found, "one JSON value", _json_hint(text, error)) from None
    except RecursionError:
        raise _too_deep(place) from None
    except ValueError as error:  # a number of thousands of digits, for one
        raise place.fault("invalid JSON", f"JSON that cannot be read ({error})", "one JSON value") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep(place)
    return value


def text_value(value: Any, place: Place, *, empty: bool = False) -> str:
    """A text that a tokenizer can take.

    Args:
        value: What stands in the field.
        place: Where it stands.
        empty: Whether an empty text is fine.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        value = _join_parts(value, place)
    if not isinstance(value, str):
        raise place.wrong_type(value, "text")
    if not empty and not value.strip():
        found = "an empty text" if not value else "a text of blanks alone"
        raise place.fault("empty field", found, "a text", "Fill it in or delete the record")
    check_characters(value, place)
    return value


def check_characters(text: str, place: Place) -> None:
    """Refuses what cannot be text: NUL characters and halves of surrogate pairs."""
    if "\x00" in text:
        found = f"a NUL character at position {text.index(chr(0)) + 1}"
        raise place.fault("NUL character", found, "text", "Delete it; the file may have been cut or be binary")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair ({text[error.start]!a}) at position {error.start + 1}"
        raise place.fault("lone surrogate", found, "text", "Write the whole character, or delete it") from None


def check_texts(value: Any, place: Place) -> None:
    """Refuses what cannot be text in any text of a JSON value, names of fields too."""
    if isinstance(value, str):
        check_characters(value, place)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_texts(item, place[i])
    elif isinstance(value, dict):
        for key, item in value.items():
            check_characters(key, place)
            check_texts(item, place[key])


def number_value(value: Any, place: Place, *, minimum: float = -LARGEST) -> float:
    """A number between `minimum` and `LARGEST`."""
    expected = f"a number of at least {minimum:g} and at most {LARGEST:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise place.wrong_type(value, expected)
    if not minimum <= value <= LARGEST:  # NaN neither
        raise place.fault("wrong value", quote(value), expected)
    return float(value)


def optional_number(record: dict, key: str, place: Place, *, minimum: float = -LARGEST) -> float | None:
    """The number in an optional field; None if it is absent or null."""
    value = record.get(key)
    return None if value is None else number_value(value, place[key], minimum=minimum)


def first_field(record: dict, keys: Sequence[str], place: Place, what: str) -> str:
    """The first of `keys` that the record has (null counts as absent); none of them is a fault."""
    for key in keys:
        if record.get(key) is not None:
            return key
    mend = "The record has: " + (field_names(record) or "nothing")
    raise place.fault("missing field", f"no {what}", f"one of the fields {', '.join(keys)}", mend)


def parse_tools(value: Any, place: Place) -> tuple[dict, ...]:
    """Function schemas: a list of objects, or the same as JSON text; empty = none.

    Returns:
        Schemas as chat templates take them, {"type": "function", "function": {"name": ..., ...}}.
    """
    if isinstance(value, str):
        value = parse_json(value, place) if value.strip() else []
    if value is None:
        return ()
    if not isinstance(value, list):
        raise place.wrong_type(value, "a list of function schemas, or the same as JSON text")
    return tuple(_schema(item, place[i]) for i, item in enumerate(value))


def parse_calls(value: Any, place: Place) -> tuple[dict, ...]:
    """Function calls: one {"name", "arguments"} or a list of them, as a value or as JSON text.

    Returns:
        Calls as {"name": str, "arguments": dict}.
    """
    if isinstance(value, str):
        value = parse_json(text_value(value, place), place)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise place.fault("empty field", "an empty list", "a function call")
    return tuple(_call(call, place) for call in calls)


def _schema(value: Any, place: Place) -> dict:
    inner = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise place.wrong_type(value, 'a function schema, {"name": ..., "description": ..., "parameters": ...}')
    check_texts(inner, place)
    return {"type": "function", "function": inner}


def _call(value: Any, place: Place) -> dict:
    inner = value.get("function", value) if isinstance(value, dict) else value
    expected = 'a function call, {"name": ..., "arguments": {...}}'
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise place.wrong_type(value, expected)
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, place["arguments"]) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise place["arguments"].wrong_type(arguments, "an object of arguments")
    check_texts([inner["name"], arguments], place)
    return {"name": inner["name"], "arguments": arguments}


def _join_parts(parts: list[dict], place: Place) -> str:
    texts = []
    for i, part in enumerate(parts):
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            expected = 'a part {"type": "text", "text": ...}'
            raise place[i].fault("wrong type", quote(part), expected, "Nothing but text can be read")
        texts.append(part["text"])
    return "".join(texts)


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    if "\x00" in text:
        return "There is a NUL byte in it: the file may have been cut, or be binary or UTF-16"
    if error.msg == "Extra data" and "\r" in text:
        return "Its lines end with carriage returns alone; convert the file, for example: tr '\\r' '\\n'"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return "It ends too early: the file may have been cut"
    return ""


class _DuplicateField(Exception):  # no ValueError: `parse_json` tells it from those
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no field is lost: plain `json` would keep the last one of equal names."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _DuplicateField(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return value


def _depth(value: Any) -> int:
    """Lists and objects within each other, found without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _too_deep(place: Place) -> DataError:
    return place.fault("invalid JSON", "JSON nested too deeply to read", f"a record at most {MAX_DEPTH} levels deep")
