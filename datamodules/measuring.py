"""One source of data, read and tokenised whole: every fault, and every example's length before a policy touched it."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.formats import DataError, HubSource, OverlongError, RawRecord, Source, read
from datamodules.report import SplitReport
from datamodules.rows import Rows
from datamodules.store import Encoder, Guard, table_of, without_progress_bar

if TYPE_CHECKING:
    import datasets

WHOLE = "whole_"
"""Before the name of a column of ids: how many ids the example had before `overlong` was applied."""

UNLIMITED = 1 << 62


class MeasuringGuard(Guard):
    """A guard that never ends anything, and measures what it sees.

    Beside the encoder's row it makes `whole_<column>` for every column of ids, and `digest`: a number that is the
    same for rows that are the same token for token.

    Args:
        encoder: What makes the rows.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, "skip")
        self.ids = [name for name, kind in encoder.columns.items() if kind.startswith("int") and kind.endswith("[]")]
        limited = is_dataclass(encoder) and hasattr(encoder, "max_length")
        uncut = replace(encoder, max_length=UNLIMITED) if limited else encoder  # type: ignore[type-var]
        self._uncut = Guard(uncut, "skip")

    @property
    def columns(self) -> dict[str, str]:
        """The guard's columns and the measures."""
        return super().columns | {f"{WHOLE}{name}": "int64" for name in self.ids} | {"digest": "int64"}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row of a raw record, measured."""
        made = super().__call__(row)
        # What was neither cut nor refused for its length is whole.
        whole = self._uncut(row) if made["cut"] or _is_overlong(made["fault"]) else made
        sizes = {f"{WHOLE}{name}": len(whole[name]) for name in self.ids}
        return made | sizes | {"digest": self._digest(made)}

    def _digest(self, made: dict[str, Any]) -> int:
        lists = [np.asarray(made[name]) for name, kind in self.encoder.columns.items() if kind.endswith("[]")]
        digest = hashlib.blake2b(digest_size=8)
        for values in lists:
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True)
class Measured:
    """What a source holds.

    Attributes:
        rows: Rows of the records that are kept, with the columns of `MeasuringGuard`; None = nothing is left.
        report: What became of the records under the policy `skip` for faults.
        reasons: Faults by reason; examples that do not fit are among them if the policy is "raise".
        faults: Some of these faults, of every reason if the limit allows it, in the order of the files.
        left_out: Lengths of the examples that `overlong` leaves out, by column of ids, int64 [M].
        max_length: Budget of an example; None = records are joined and cut in blocks.
    """

    rows: Rows | None
    report: SplitReport
    reasons: Counter[str]
    faults: list[DataError]
    left_out: dict[str, np.ndarray]
    max_length: int | None


def measure(
    sources: Sequence[Source], encoder: Encoder, folder: Path, *, limit: int, num_proc: int | None, name: str
) -> Measured:
    """Reads and tokenises a source as a run would, but to its end whatever is found.

    Args:
        sources: Where to read.
        encoder: What makes the rows.
        folder: Where the rows may lie; a folder of its own is made there.
        limit: Faults to keep in full; all are counted.
        num_proc: Worker processes; None = this process alone.
        name: Of the split, for the progress bar.
    """
    guard, report, of_files = MeasuringGuard(encoder), SplitReport(), list[DataError]()
    own = Path(tempfile.mkdtemp(dir=folder))
    records = _counted(read(sources, of_files.append, pieces=encoder.pieces), report)
    table = table_of(records, guard, own, num_proc, name)
    report.records += len(of_files)
    dumps = table.data.column("fault").to_pylist() if table is not None else []
    found = [*of_files, *(DataError.load(dump) for dump in dumps if dump)]
    for fault in found:
        report.add(fault)
    faults = [fault for fault in found if encoder.overlong == "raise" or not isinstance(fault, OverlongError)]
    overlong = np.array([_is_overlong(dump) for dump in dumps], dtype=bool)
    return Measured(
        rows=_kept(table, np.array([not dump for dump in dumps], dtype=bool), own, report),
        report=report,
        reasons=Counter(fault.reason for fault in faults),
        faults=some_of_each(_in_order(faults, sources), limit),
        left_out=_sizes(table, guard, overlong),
        max_length=getattr(encoder, "max_length", None),
    )


def some_of_each(faults: Sequence[DataError], limit: int) -> list[DataError]:
    """The first faults of every reason, so that a common one cannot hide a rare one; they keep their order."""
    seen: Counter[str] = Counter()
    turns = []
    for number, fault in enumerate(faults):
        turns.append((seen[fault.reason], number))
        seen[fault.reason] += 1
    return [faults[number] for number in sorted(number for _, number in sorted(turns)[:limit])]


def _counted(records: Iterator[RawRecord], report: SplitReport) -> Iterator[RawRecord]:
    for record in records:
        report.records += 1
        yield record


def _kept(table: datasets.Dataset | None, good: np.ndarray, folder: Path, report: SplitReport) -> Rows | None:
    """The rows without fault; what was cut of them is counted."""
    import datasets

    if table is None or not good.any():
        return None
    cuts = table.data.column("cut").to_pylist()
    report.cut = Counter(cut for row in np.flatnonzero(good) for cut in cuts[row].split("|") if cut)
    if not good.all():
        # Written anew: rows are read from the table itself, which a selection leaves as it was.
        with without_progress_bar():
            table.select(np.flatnonzero(good)).save_to_disk(str(folder / "rows"))
        table = datasets.load_from_disk(str(folder / "rows"))
    return Rows(table)


def _sizes(table: datasets.Dataset | None, guard: MeasuringGuard, chosen: np.ndarray) -> dict[str, np.ndarray]:
    if table is None:
        return {name: np.zeros(0, dtype=np.int64) for name in guard.ids}
    return {name: table.data.column(f"{WHOLE}{name}").to_numpy()[chosen] for name in guard.ids}


def _in_order(faults: list[DataError], sources: Sequence[Source]) -> list[DataError]:
    """Faults by file, in the order of the sources, and by line; those of files as wholes were found apart."""
    names = [f"{s.path}[{s.split}]" if isinstance(s, HubSource) else s.path for s in sources]
    number = {name: i for i, name in enumerate(names)}

    def place(fault: DataError) -> tuple[int, int]:
        file, _, line = fault.origin.rpartition(":")
        name = file if line.isdigit() else fault.origin
        return number.get(name, len(number)), int(line) if line.isdigit() else 0

    return sorted(faults, key=place)


def _is_overlong(fault: str) -> bool:
    return bool(fault) and isinstance(DataError.load(fault), OverlongError)
