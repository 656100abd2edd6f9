"""What is wrong with a record, said so that its owner can mend it: where, what was found, what was expected."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

SHOWN = 60
"""Characters of a faulty value that a message quotes."""

SHOWN_NAMES = 20
"""Fields of a faulty record that a message names."""

SHOWN_FAULTS = 5
"""Faults that are quoted in full; all are counted."""


class DataError(ValueError):
    """A fault of the user's data.

    Args:
        reason: The kind of fault in a few words; faults are counted by it.
        origin: Where the record stands, "file:line".
        field: Path of the faulty field within the record, such as "conversations[2].value"; may be empty.
        found: What stands there.
        expected: What should stand there.
        mend: How to mend it; may be empty.
    """

    def __init__(self, reason: str, origin: str, field: str, found: str, expected: str, mend: str = "") -> None:
        # Whatever stands in the data: the message can be printed and written to a file.
        origin, field, found, mend = map(encodable, (origin, field, found, mend))
        where = f"{origin}: {field}" if field else origin
        super().__init__(f"{where}: found {found}; expected {expected}{'. ' + mend if mend else ''}")
        self.reason, self.origin, self.field = reason, origin, field
        self.found, self.expected, self.mend = found, expected, mend

    def __reduce__(self) -> tuple:
        """Pickle would call the constructor with the message alone."""
        return type(self), (self.reason, self.origin, self.field, self.found, self.expected, self.mend)

    def dump(self) -> str:
        """The fault as a line of text, to be carried in a table."""
        return json.dumps([isinstance(self, OverlongError), *self.__reduce__()[1]])

    @staticmethod
    def load(text: str) -> DataError:
        """The inverse of `dump`."""
        overlong, *parts = json.loads(text)
        return (OverlongError if overlong else DataError)(*parts)


class OverlongError(DataError):
    """An example that does not fit in the token budget: a matter of the `overlong` policy, not of `on_error`."""

    @classmethod
    def at(cls, place: Place, reason: str, found: str, expected: str, mend: str) -> OverlongError:
        """The error of the example whose record stands at `place`."""
        return cls(reason, place.origin, place.field, found, expected, mend)


def first_of(faults: Sequence[DataError]) -> DataError:
    """One error that quotes the first fault in full, the next few too, and counts them all by reason.

    Args:
        faults: At least one.
    """
    first, count = faults[0], len(faults)
    if count == 1:
        return first
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(fault.reason for fault in faults).items())
    rest = "".join(f"\n  {fault}" for fault in faults[1:SHOWN_FAULTS])
    more = f"\n  ... and {count - SHOWN_FAULTS} more" if count > SHOWN_FAULTS else ""
    mend = f"{first.mend}\nThis is the first of {count} faults ({reasons}); the next are:{rest}{more}"
    return type(first)(first.reason, first.origin, first.field, first.found, first.expected, mend)


@dataclass(frozen=True)
class Place:
    """A field of a record: it makes the faults found there.

    Attributes:
        origin: "file:line" of the record.
        field: Path of the field; empty = the record itself.
    """

    origin: str
    field: str = ""

    def __getitem__(self, key: str | int) -> Place:
        """The place of a member: a field by name, an item by number."""
        step = f"[{key}]" if isinstance(key, int) else f".{_short(key)}" if self.field else _short(key)
        return Place(self.origin, self.field + step)

    def fault(self, reason: str, found: str, expected: str, mend: str = "") -> DataError:
        """The fault to raise here."""
        return DataError(reason, self.origin, self.field, found, expected, mend)

    def wrong_type(self, value: Any, expected: str, mend: str = "") -> DataError:
        """The fault of a value whose type is not the expected one."""
        return self.fault("wrong type", quote(value), expected, mend)


def quote(value: Any) -> str:
    """A short, printable picture of a value for error messages, with its type where that is the news."""
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {_short(value)!a}" if not value.isprintable() else f'the text "{_short(value)}"'
    if isinstance(value, dict):
        return f"an object with the fields {field_names(value) or '(none)'}"
    return f"{names.get(type(value), type(value).__name__)} ({_short(str(value))})"


def field_names(record: dict) -> str:
    """The names of a record's fields, as many of them as a message can hold."""
    names = [_short(str(name)) for name in islice(record, SHOWN_NAMES)]
    return ", ".join(names) + f" and {len(record) - SHOWN_NAMES} more" * (len(record) > SHOWN_NAMES)


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs written as escapes (odd file names and odd records hold them)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word[:SHOWN].lower(), list(known), n=1)
    return f'Did you mean "{close[0]}"?' if close else ""


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
