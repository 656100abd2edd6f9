"""From files to raw records that know where they stand. Parsing them is left to the worker processes.

A raw record is JSON text. JSON lines are handed on as they are, so reading costs next to nothing and a line is
parsed once, where it is tokenised.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.formats.errors import DataError, Place, encodable
from datamodules.formats.fields import check_characters
from datamodules.formats.sources import FileSource, HubSource, Source, unreadable

if TYPE_CHECKING:
    import pyarrow as pa

OnFault = Callable[[DataError], None]
"""Told of each fault in a file as a whole: it raises the fault or counts it, and reading goes on."""

PIECE = 1 << 20
"""Characters after which a long text document is cut (at a line break) into pieces that are tokenised one by one."""

BLANKS = re.compile(r"\s*")


@dataclass(frozen=True)
class RawRecord:
    """A record as JSON text.

    Attributes:
        text: The JSON text.
        origin: "file:line"; for parquet files and datasets the number is the row's, from 1.
        continues: The next record goes on with the same document (pieces of a long text file).
        source: Number of the source that it comes from, in the order in which they are read.
    """

    text: str
    origin: str
    continues: bool = False
    source: int = 0


def read(
    sources: Iterable[Source], on_fault: OnFault, *, pieces: bool = False, streaming: bool = False
) -> Iterator[RawRecord]:
    """All records of all sources, in order.

    Args:
        sources: Where to read.
        on_fault: Told of files that are empty, not UTF-8, or broken; records with faults of their own come through.
        pieces: Whether text files may come in pieces.
        streaming: Whether rows of `datasets` ids are fetched one by one instead of downloaded first.
    """
    for number, source in enumerate(sources):
        items = _hub(source, streaming) if isinstance(source, HubSource) else _file(source, pieces)
        for item in items:
            if isinstance(item, DataError):
                on_fault(item)
            else:
                yield replace(item, source=number)


def _file(source: FileSource, pieces: bool) -> Iterator[RawRecord | DataError]:
    """The records and faults of a file; a file without any is a fault."""
    name, suffix = encodable(source.path), Path(source.path).suffix.lower()
    readers: dict[str, Callable[..., Iterator[RawRecord | DataError]]]
    readers = {".txt": _text, ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".parquet": _parquet}
    if suffix not in readers:
        raise ValueError(f"{name}: cannot read a file of this kind, expected one of {', '.join(readers)}")
    options = {"pieces": pieces} if suffix == ".txt" else {}
    count = 0
    try:
        for item in readers[suffix](source.path, name, **options):
            count += 1
            yield item
    except OSError as error:
        yield unreadable(name, error)
    else:
        if not count:
            yield Place(name).fault("empty file", "no record", "at least one", "Fill the file or leave it out")


def _lines(path: str, name: str) -> Iterator[RawRecord | DataError]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = Place(f"{name}:{number}")
            try:
                text = _decode(line, place, first=number == 1)
            except DataError as error:
                yield error
                continue
            if text.strip():
                yield RawRecord(text.strip(), place.origin)


def _json(path: str, name: str) -> Iterator[RawRecord | DataError]:
    """A list of records, or records one after the other; a single list of messages is one conversation."""
    text, fault = _decode_file(path, name)
    values: list[tuple[str, int]] = []
    all_messages = True
    try:
        for value, piece, line in _values(text, name):
            values.append((piece, line))
            all_messages = all_messages and _is_message(value)
    except DataError as error:
        fault = fault or error
    if all_messages and values:
        if fault is None:  # a conversation that breaks off would be taken for a whole one
            yield RawRecord(f"[{','.join(piece for piece, _ in values)}]", f"{name}:{values[0][1]}")
    else:
        for piece, line in values:
            yield RawRecord(piece, f"{name}:{line}")
    if fault is not None:
        yield fault


def _decode_file(path: str, name: str) -> tuple[str, DataError | None]:
    """The text of a file up to the first line that is not UTF-8, and the fault of that line."""
    lines: list[str] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                lines.append(_decode(line, Place(f"{name}:{number}"), first=number == 1))
            except DataError as error:
                place, mend = Place(error.origin), f"{error.mend}. What follows is not read"
                return "".join(lines), place.fault(error.reason, error.found, error.expected, mend)
    return "".join(lines), None


def _values(text: str, name: str) -> Iterator[tuple[Any, str, int]]:
    """The items of a JSON list, or of JSON values written one after the other, each with its text and its line."""
    decoder = json.JSONDecoder()
    at, counted, line = _skip(text, 0), 0, 1
    in_list = text.startswith("[", at)
    at = _skip(text, at + in_list)
    while at < len(text) and not (in_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        place = Place(f"{name}:{line}")
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            found = f"invalid JSON ({getattr(error, 'msg', 'nested too deeply, or a number too long')})"
            mend = "Check it and the comma before it; what follows is not read"
            raise place.fault("invalid JSON", found, "a record", mend) from None
        yield value, text[at:end], line
        at = _skip(text, end)
        if in_list:
            if text[at : at + 1] not in (",", "]"):
                found = "no comma after this record"
                raise place.fault("invalid JSON", found, "a comma or ]", "What follows is not read")
            at = _skip(text, at + (text[at] == ","))
    if in_list:
        _check_end(text, at, Place(f"{name}:{line + text.count(chr(10), counted, at)}"))


def _check_end(text: str, at: int, place: Place) -> None:
    """Refuses a list that does not end at `at`, and text after its end."""
    if at >= len(text):
        raise place.fault("invalid JSON", "a list without end", "a closing ]", "Was the file cut?")
    if _skip(text, at + 1) < len(text):
        mend = "It is not read; put several lists in one list, or each on a line of a .jsonl file"
        raise place.fault("invalid JSON", "text after the end of the list", "nothing after the closing ]", mend)


def _skip(text: str, at: int) -> int:
    return BLANKS.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys())


def _text(path: str, name: str, pieces: bool) -> Iterator[RawRecord | DataError]:
    """One document; if allowed, in pieces of about `PIECE` characters that begin where a line does."""
    fault = _check_text(path, name)
    if fault is not None:
        yield fault
        return
    parts, size, started = [""], 0, 1
    with open(path, encoding="utf-8-sig", newline=None) as file:
        for number, line in enumerate(file, start=1):
            if pieces and size >= PIECE and _may_cut(parts[-1], line):
                yield _piece(parts, f"{name}:{started}", continues=True)
                parts, size, started = [], 0, number
            parts.append(line)
            size += len(line)
    if size:
        yield _piece(parts, f"{name}:{started}", continues=False)


def _may_cut(before: str, after: str) -> bool:
    """Whether a document may be cut between two lines: where a single line break stands between visible characters.

    Tokenisers join blanks to runs, so there, and there alone, the tokens of the parts are those of the whole.
    """
    return len(before) > 1 and not before[-2].isspace() and not after[:1].isspace()


def _piece(parts: list[str], origin: str, continues: bool) -> RawRecord:
    return RawRecord(json.dumps({"text": "".join(parts)}, ensure_ascii=False), origin, continues)


def _check_text(path: str, name: str) -> DataError | None:
    """Looks through a text file once, so that it is refused as a whole or not at all."""
    blank = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = Place(f"{name}:{number}")
            try:
                text = _decode(line, place, first=number == 1)
                check_characters(text, place)
            except DataError as error:
                return error
            blank = blank and not text.strip()
    return Place(name).fault("empty file", "no text", "a document", "Fill it or leave it out") if blank else None


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


def _parquet(path: str, name: str) -> Iterator[RawRecord | DataError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            yield Place(name).fault("duplicate field", f"the columns {', '.join(columns)}", "every column once")
            return
        for batch in file.iter_batches(batch_size=1000):
            for row in _rows(batch):
                number += 1
                yield _row_record(row, Place(f"{name}:{number}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        found = f"a file that cannot be read ({' '.join(str(error).split())[:200]})"
        mend = "Was it cut? What follows is not read"
        yield Place(f"{name}:{number + 1}").fault("broken file", found, "a parquet file", mend)


def _rows(batch: pa.RecordBatch) -> list[dict | Exception]:
    """The rows of a batch; in place of one that cannot be had, the error."""
    import pyarrow as pa

    try:
        return batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [error]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _row_record(row: dict | Exception, place: Place) -> RawRecord | DataError:
    """A row of a table as JSON text; bytes have to be UTF-8 text (dates and the like become text)."""
    if isinstance(row, Exception):
        return place.fault("broken row", f"a row that cannot be read ({row})", "texts, numbers, lists and structs")

    def plain(value: Any) -> str:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)

    try:
        return RawRecord(json.dumps(row, default=plain), place.origin)
    except UnicodeDecodeError as error:
        found = f"bytes that are not UTF-8 (0x{error.object[error.start]:02x} at byte {error.start + 1})"
        return place.fault("encoding", found, "UTF-8 text", "Convert the column to text")


def _hub(source: HubSource, streaming: bool) -> Iterator[RawRecord | DataError]:
    name = f"{source.path}[{source.split}]"
    for number, row in enumerate(source.load(streaming), start=1):
        yield _row_record(row, Place(f"{name}:{number}"))
