"""From files to raw records that know where they stand. Parsing them is left to the worker processes.

A raw record is JSON text. JSON lines are handed on as they are, so reading costs next to nothing and a line is
parsed once, where it is tokenised.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.formats.errors import DataError, Place
from datamodules.formats.fields import check_characters
from datamodules.formats.sources import FileSource, HubSource, Source

OnFault = Callable[[DataError], None]
"""Told of each fault in a file as a whole: it raises the fault or counts it, and reading goes on."""

PIECE = 1 << 20
"""Characters after which a long text document is cut (at a line break) into pieces that are tokenised one by one."""


@dataclass(frozen=True)
class RawRecord:
    """A record as JSON text.

    Attributes:
        text: The JSON text.
        origin: "file:line"; for parquet files and datasets the number is the row's, from 1.
        continues: The next record goes on with the same document (pieces of a long text file).
    """

    text: str
    origin: str
    continues: bool = False


def read(sources: Iterable[Source], on_fault: OnFault, *, pieces: bool = False) -> Iterator[RawRecord]:
    """All records of all sources, in order.

    Args:
        sources: Where to read.
        on_fault: Told of files that are empty, not UTF-8, or broken; records with faults of their own come through.
        pieces: Whether text files may come in pieces.
    """
    for source in sources:
        if isinstance(source, HubSource):
            yield from _hub(source)
        else:
            yield from _file(source, on_fault, pieces)


def _file(source: FileSource, on_fault: OnFault, pieces: bool) -> Iterator[RawRecord]:
    suffix = Path(source.path).suffix.lower()
    readers: dict[str, Callable[..., Iterator[RawRecord | DataError]]]
    readers = {".txt": _text, ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".parquet": _parquet}
    if suffix not in readers:
        raise ValueError(f"{source.path}: cannot read a file of this kind, expected one of {', '.join(readers)}")
    options = {"pieces": pieces} if suffix == ".txt" else {}
    count = 0
    for item in readers[suffix](source.path, **options):
        count += 1
        if isinstance(item, DataError):
            on_fault(item)
        else:
            yield item
    if not count:
        on_fault(Place(source.path).fault("empty file", "no record", "at least one", "Fill the file or leave it out"))


def _lines(path: str) -> Iterator[RawRecord | DataError]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = Place(f"{path}:{number}")
            try:
                text = _decode(line, place, first=number == 1)
            except DataError as error:
                yield error
                continue
            if text.strip():
                yield RawRecord(text.strip(), place.origin)


def _json(path: str) -> Iterator[RawRecord | DataError]:
    """A list of records, or records one after the other; a single list of messages is one conversation."""
    values, fault = [], None
    try:
        with open(path, "rb") as file:
            lines = [_decode(line, Place(f"{path}:{n}"), first=n == 1) for n, line in enumerate(file, start=1)]
        for value in _values("".join(lines), path):
            values.append(value)
    except DataError as error:
        fault = error
    if values and all(_is_message(value) for value, _ in values):
        yield RawRecord(json.dumps([value for value, _ in values]), f"{path}:{values[0][1]}")
    else:
        for value, line in values:
            yield RawRecord(json.dumps(value), f"{path}:{line}")
    if fault is not None:
        yield fault


def _values(text: str, path: str) -> Iterator[tuple[Any, int]]:
    """The items of a JSON list, or of JSON values written one after the other, each with its line."""
    decoder = json.JSONDecoder()
    at, counted, line = _skip(text, 0), 0, 1
    in_list = text.startswith("[", at)
    at = _skip(text, at + in_list)
    while at < len(text) and not (in_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        place = Place(f"{path}:{line}")
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            found = f"invalid JSON ({getattr(error, 'msg', 'nested too deeply, or a number too long')})"
            mend = "Check it and the comma before it; what follows is not read"
            raise place.fault("invalid JSON", found, "a record", mend) from None
        yield value, line
        at = _skip(text, end)
        if in_list:
            if text[at : at + 1] not in (",", "]"):
                found = "no comma after this record"
                raise place.fault("invalid JSON", found, "a comma or ]", "What follows is not read")
            at = _skip(text, at + (text[at] == ","))
    if in_list and at >= len(text):
        raise Place(f"{path}:{line}").fault("invalid JSON", "a list without end", "a closing ]", "Was the file cut?")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys())


def _text(path: str, pieces: bool) -> Iterator[RawRecord | DataError]:
    """One document; if allowed, in pieces of about `PIECE` characters that begin where a line does."""
    fault = _check_text(path)
    if fault is not None:
        yield fault
        return
    parts, size, started = [""], 0, 1
    with open(path, encoding="utf-8-sig", newline=None) as file:
        for number, line in enumerate(file, start=1):
            if pieces and size >= PIECE and _may_cut(parts[-1], line):
                yield _piece(parts, f"{path}:{started}", continues=True)
                parts, size, started = [], 0, number
            parts.append(line)
            size += len(line)
    if size:
        yield _piece(parts, f"{path}:{started}", continues=False)


def _may_cut(before: str, after: str) -> bool:
    """Whether a document may be cut between two lines: where a single line break stands between visible characters.

    Tokenisers join blanks to runs, so there, and there alone, the tokens of the parts are those of the whole.
    """
    return len(before) > 1 and not before[-2].isspace() and not after[:1].isspace()


def _piece(parts: list[str], origin: str, continues: bool) -> RawRecord:
    return RawRecord(json.dumps({"text": "".join(parts)}, ensure_ascii=False), origin, continues)


def _check_text(path: str) -> DataError | None:
    """Looks through a text file once, so that it is refused as a whole or not at all."""
    blank = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = Place(f"{path}:{number}")
            try:
                text = _decode(line, place, first=number == 1)
                check_characters(text, place)
            except DataError as error:
                return error
            blank = blank and not text.strip()
    return Place(path).fault("empty file", "no text", "a document", "Fill it or leave it out") if blank else None


def _decode(data: bytes, place: Place, *, first: bool) -> str:
    """UTF-8 text without a byte order mark and with plain line ends."""
    if first and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise place.fault("encoding", "UTF-16", "UTF-8", "Save the file as UTF-8")
    if first and data.startswith(codecs.BOM_UTF8):
        data = data[len(codecs.BOM_UTF8) :]
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 (0x{data[error.start]:02x} at byte {error.start + 1})"
        mend = "Convert the file, for example: iconv -f GB18030 -t UTF-8"
        raise place.fault("encoding", found, "UTF-8 text", mend) from None


def _parquet(path: str) -> Iterator[RawRecord | DataError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield RawRecord(json.dumps(row, default=str), f"{path}:{number}")
    except (pa.ArrowException, OSError) as error:
        found = f"a file that cannot be read ({str(error).splitlines()[0]})"
        yield Place(f"{path}:{number + 1}").fault("broken file", found, "a parquet file", "Was it cut?")


def _hub(source: HubSource) -> Iterator[RawRecord]:
    name = f"{source.path}[{source.split}]"
    for number, row in enumerate(source.load(), start=1):
        yield RawRecord(json.dumps(row, default=str), f"{name}:{number}")
