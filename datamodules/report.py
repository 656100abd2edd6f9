"""What became of the records: how many were read, kept, skipped, dropped and cut, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from datamodules.formats import DataError, OverlongError
from datamodules.formats.errors import SHOWN_FAULTS


@dataclass
class SplitReport:
    """Counts of one source of data.

    Attributes:
        records: Records read (for text files: documents, or their pieces).
        skipped: Faulty records left out, by reason (policy `on_error: skip`).
        dropped: Examples left out since they do not fit, by reason (policy `overlong`).
        cut: Examples that were cut, by what was cut.
        faults: The first few faults of skipped records, in full.
        examples: Examples in the data set after all this and after splitting off held-out data.
        tokens: Unique tokens of these examples.
        trained: Sum of the loss weights of the tokens that are trained.
        cached: Whether they came tokenised from the cache.
        note: Where held-out data comes from.
    """

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    trained: float = 0.0
    cached: bool = False
    note: str = ""

    def add(self, fault: DataError) -> None:
        """Counts a record that is left out."""
        if isinstance(fault, OverlongError):
            self.dropped[fault.reason] += 1
            return
        self.skipped[fault.reason] += 1
        if len(self.faults) < SHOWN_FAULTS:
            self.faults.append(str(fault))

    def as_dict(self) -> dict[str, Any]:
        """Plain types alone."""
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SplitReport:
        """The inverse of `as_dict`."""
        counters = {key: Counter(values[key]) for key in ("skipped", "dropped", "cut")}
        return cls(**{**values, **counters})

    def __str__(self) -> str:
        parts = [f"{self.examples} examples, {self.tokens} tokens" + f", {self.trained:g} trained" * (self.trained > 0)]
        parts += [self.note] * bool(self.note)
        parts += ["tokenised before: taken from the cache, nothing tokenised"] * self.cached
        for name, counts in (("skipped", self.skipped), ("dropped", self.dropped), ("cut", self.cut)):
            if counts:
                reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(counts.items()))
                parts.append(f"{name}: {reasons} of {self.records} records")
        return "; ".join(parts) + "".join(f"\n    {fault}" for fault in self.faults)


@dataclass
class DataReport:
    """The reports of a data module's splits ("train", "validation", "test", "predict"), and its warnings."""

    splits: dict[str, SplitReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain types alone, ready for JSON."""
        return {"splits": {k: v.as_dict() for k, v in self.splits.items()}, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        lines = [f"data, {name}: {split}" for name, split in self.splits.items()]
        return "\n".join(lines + [f"data, warning: {text}" for text in self.warnings])
