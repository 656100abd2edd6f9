"""Tokenise once: records become rows of token ids, kept as Arrow under a key of all that they depend on.

The key covers the data (paths and contents), the tokenizer, its chat template and the settings, so a changed file or
option can never meet stale rows, and a second start reads what the first one wrote. A cache entry is written whole
or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from datamodules.formats import DataError, OverlongError, Place, RawRecord, Source, read
from datamodules.formats.errors import first_of
from datamodules.formats.fields import parse_json
from datamodules.overlong import Overlong
from datamodules.report import SplitReport
from datamodules.rows import Rows
from datamodules.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

OnError = Literal["raise", "skip"]

VERSION = 2
"""Of the rows' making: raising it makes every older cache entry stale."""

BATCH = 256
"""Raw records that are written at a time."""


class Encoder(Protocol):
    """Makes a row of token ids from a record; it is sent to worker processes."""

    @property
    def columns(self) -> dict[str, str]:
        """Names and types of the row: "int32[]", "float32[]", "int64", "float64" or "string"."""

    @property
    def pieces(self) -> bool:
        """Whether long text files may come in pieces."""

    @property
    def overlong(self) -> Overlong:
        """What becomes of examples that do not fit."""

    def settings(self) -> dict[str, Any]:
        """Everything that its rows depend on, besides the data and the tokenizer; plain types."""

    def __call__(self, record: Any, place: Place, continues: bool) -> tuple[dict[str, Any], list[str]]:
        """The row of a record and what was cut of it; faults are raised as `DataError`."""


@dataclass(frozen=True)
class Tokenised:
    """Rows with their report, and what they depend on.

    Attributes:
        rows: The rows.
        report: What became of the records.
        parts: Everything that the rows depend on, by name, as plain types: "data" (path and digest of each source),
            "tokenizer", "settings", "version".
    """

    rows: Rows
    report: SplitReport
    parts: dict[str, Any]


def tokenise(
    sources: Sequence[Source],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_error: OnError,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    name: str = "data",
) -> Tokenised:
    """Rows of all records of all sources, from the cache if they are there.

    Args:
        sources: Where to read.
        encoder: What makes the rows.
        tokenizer: What the encoder tokenises with (for the key).
        on_error: Whether a faulty record ends it all or is counted and left out.
        cache_dir: Where rows are kept; None = `cache_folder()`.
        num_proc: Worker processes; None = this process alone.
        name: Of the split, for the progress bar.

    Raises:
        DataError: A fault, if `on_error` is "raise"; an example that does not fit, if `overlong` is "raise".
        ValueError: No record is left.
    """
    folder, parts = entry_of(sources, encoder, tokenizer, on_error, cache_dir)
    cached = (folder / "report.json").is_file()
    if not cached:
        _build(folder, sources, Guard(encoder, on_error), num_proc, name)
    import datasets

    try:
        report = SplitReport.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
        rows = Rows(datasets.load_from_disk(str(folder / "rows")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: this cache entry is damaged ({error}); delete it, and it is made anew") from error
    report.cached = cached
    return Tokenised(rows, report, parts)


def entry_of(
    sources: Sequence[Source], encoder: Encoder, tokenizer: PreTrainedTokenizerBase, on_error: OnError, root: str | None
) -> tuple[Path, dict[str, Any]]:
    """Where rows are kept, and what they depend on (see `Tokenised.parts`); arguments as in `tokenise`."""
    parts = {
        "version": VERSION,
        "data": [source.fingerprint() for source in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "settings": {"encoder": type(encoder).__name__, "on_error": on_error, **encoder.settings()},
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder(root) / key, parts


def cache_folder(cache_dir: str | None = None) -> Path:
    """Where rows are kept: `cache_dir`, else $LIT_ALIGN_CACHE, else ~/.cache/lit_align, each with /data below it."""
    root = cache_dir or os.environ.get("LIT_ALIGN_CACHE") or Path.home() / ".cache" / "lit_align"
    return Path(root).expanduser() / "data"


def prompt_key(value: Any) -> int:
    """A number for a prompt (or a document): equal prompts have equal numbers. A signed 64-bit integer."""
    digest = hashlib.blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Guard:
    """Runs an encoder on raw records; a fault becomes an empty row, so that all are known before one is raised.

    Args:
        encoder: What makes the rows.
        on_error: What becomes of faulty records.
    """

    def __init__(self, encoder: Encoder, on_error: OnError) -> None:
        self.encoder, self.on_error = encoder, on_error
        blank = {"int64": 0, "float64": 0.0, "string": ""}
        self.empty = {
            name: np.empty(0, kind[:-2]) if kind.endswith("[]") else blank[kind]
            for name, kind in encoder.columns.items()
        }

    @property
    def columns(self) -> dict[str, str]:
        """Names and types of what it makes: the encoder's row, its source, what was cut ("a|b"), a fault as text."""
        return {**self.encoder.columns, "source": "int64", "cut": "string", "fault": "string"}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row of a raw record, {"text", "origin", "continues", "source"}."""
        place, more = Place(row["origin"]), {"source": row["source"]}
        try:
            columns, cuts = self.encoder(parse_json(row["text"], place), place, row["continues"])
        except DataError as error:
            return {**self.empty, **more, "cut": "", "fault": error.dump()}
        return {**columns, **more, "cut": "|".join(cuts), "fault": ""}

    def refuses(self, error: DataError) -> bool:
        """Whether the fault's policy is to end it all."""
        policy = self.encoder.overlong if isinstance(error, OverlongError) else self.on_error
        return policy == "raise"


def _build(folder: Path, sources: Sequence[Source], guard: Guard, num_proc: int | None, name: str) -> None:
    """Reads, tokenises, counts and writes; only the whole result appears under its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        report = SplitReport()
        table = table_of(_checked(read_all(sources, guard, report), report), guard, building, num_proc, name)
        kept = keep(table, guard, report) if table is not None else None
        if kept is None or not len(kept):
            raise ValueError(nothing_left(sources, report))
        with without_progress_bar():
            kept.save_to_disk(str(building / "entry" / "rows"))
        (building / "entry" / "report.json").write_text(json.dumps(report.as_dict()), encoding="utf-8")
        if not folder.exists():  # another process may have been faster
            os.replace(building / "entry", folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_all(sources: Sequence[Source], guard: Guard, report: SplitReport) -> Iterator[RawRecord]:
    """All raw records; faults of whole files are raised or counted by the same policy as those of records."""

    def on_fault(error: DataError) -> None:
        if guard.refuses(error):
            raise error
        report.records += 1
        report.add(error)

    return read(sources, on_fault, pieces=guard.encoder.pieces)


def _checked(records: Iterable[RawRecord], report: SplitReport) -> Iterator[RawRecord]:
    for record in records:
        report.records += 1
        yield record


def table_of(
    records: Iterator[RawRecord], guard: Guard, folder: Path, num_proc: int | None, name: str
) -> datasets.Dataset | None:
    """What a guard makes of records, in their order; None if there are none. The table lies in the folder."""
    raw = _write_raw(folder / "raw.arrow", records)
    return _map(raw, guard, num_proc, folder, name) if len(raw) else None


def _write_raw(path: Path, records: Iterator[RawRecord]) -> datasets.Dataset:
    """Raw records as an Arrow file, so that worker processes share them and memory stays free."""
    import pyarrow as pa
    from datasets import Dataset

    kinds = {"text": pa.large_string(), "origin": pa.string(), "continues": pa.bool_(), "source": pa.int64()}
    schema = pa.schema(list(kinds.items()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(records, BATCH)):
            arrays = [pa.array([getattr(record, name) for record in batch], kind) for name, kind in kinds.items()]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return Dataset.from_file(str(path))


def _map(raw: datasets.Dataset, guard: Guard, num_proc: int | None, building: Path, name: str) -> datasets.Dataset:
    num_proc = min(num_proc, len(raw)) if num_proc and num_proc > 1 else None
    return raw.map(
        guard,
        remove_columns=raw.column_names,
        features=features_of(guard.columns),
        num_proc=num_proc,
        cache_file_name=str(building / "mapped.arrow"),
        new_fingerprint=building.name.strip("."),  # ours is the key of the folder: hashing the function tells nothing
        desc=f"tokenising {name}",
    )


def features_of(columns: dict[str, str]) -> datasets.Features:
    """The types of columns as the library names them."""
    from datasets import Features, Sequence, Value

    return Features({k: Sequence(Value(v[:-2])) if v.endswith("[]") else Value(v) for k, v in columns.items()})


def keep(table: datasets.Dataset, guard: Guard, report: SplitReport) -> datasets.Dataset:
    """Raises or counts faults, counts cuts, and takes off the table what is left out."""
    faulty = np.array([fault != "" for fault in table.data.column("fault").to_pylist()])
    faults = [DataError.load(table.data.column("fault")[int(row)].as_py()) for row in np.flatnonzero(faulty)]
    if refused := [fault for fault in faults if guard.refuses(fault)]:
        raise first_of(refused)
    for fault in faults:
        report.add(fault)
    cuts = table.data.column("cut").to_pylist()
    report.cut = Counter(name for row in np.flatnonzero(~faulty) for name in cuts[row].split("|") if name)
    kept = table.select(np.flatnonzero(~faulty)) if faults else table
    return kept.remove_columns(["cut", "fault"])


def nothing_left(sources: Sequence[Source], report: SplitReport) -> str:
    """Why there is not a single example."""
    names = ", ".join(source.path for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
    if not report.records:
        return f"{names}: found no record, expected at least one"
    return f"no record of {names} can be used: {report}"


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """No progress bar for what takes no time."""
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
