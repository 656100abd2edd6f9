"""What a check of the data found, and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from datamodules.formats import DataError
from datamodules.lengths import PlanCost, Spread
from datamodules.pieces import printable
from datamodules.report import SplitReport

WIDTH = 14
"""Columns of a line's label."""


@dataclass
class SplitCheck:
    """What was found in one split.

    Attributes:
        name: Of the split.
        report: What became of its records.
        max_length: Budget of an example in tokens; None = there is none, text is cut in blocks.
        source: Where it was read; empty = split off the training data.
        spreads: Lengths by kind of text, before `overlong` is applied.
        too_long: Examples that exceed `max_length`.
        repeats: Examples that are there before, token for token; of the first few, (where, where before).
        untrained: Examples without a trained token.
        ends: In how many sequences the end-of-turn token is trained, and of how many; None = nothing is trained.
        steps: Optimizer steps (or batches) of an epoch.
        layout: The configured layout.
        cost: Of the micro-batches of an epoch; None = nothing is laid out yet.
    """

    name: str
    report: SplitReport
    max_length: int | None
    source: str = ""
    spreads: dict[str, Spread] = field(default_factory=dict)
    too_long: int = 0
    repeats: tuple[int, list[tuple[str, str]]] = (0, [])
    untrained: int = 0
    ends: tuple[int, int] | None = None
    steps: int = 0
    layout: str = ""
    cost: PlanCost | None = None

    def warnings(self) -> list[str]:
        """What stops nothing, and should be known."""
        texts = []
        count, places = self.repeats
        if count:
            where = "".join(f"\n  {place} repeats {before}" for place, before in places)
            more = f"\n  ... and {count - len(places)} more" if count > len(places) else ""
            texts.append(
                f"{count} examples of the {self.name} data repeat an earlier one, token for token:{where}{more}"
            )
        if self.untrained:
            texts.append(f"{self.untrained} examples of the {self.name} data have no trained token")
        return texts


@dataclass
class CheckReport:
    """What a check found; `str` gives it for people.

    Attributes:
        name: Of the data module.
        on_error: The configured policy for faulty records.
        overlong: The policy for examples that do not fit.
        template: What is known of the chat template, line by line.
        splits: By name.
        reasons: All faults by reason.
        faults: The first of them, each with the split that it stands in.
        problems: What would stop a run and belongs to no record.
        warnings: What stops nothing, and should be known.
    """

    name: str
    on_error: str
    overlong: str
    template: list[str] = field(default_factory=list)
    splits: dict[str, SplitCheck] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, DataError]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is neither fault nor problem."""
        return not self.reasons and not self.problems

    def __str__(self) -> str:
        return printable("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        yield f"data check: {self.name}"
        for number, line in enumerate(self.template):
            yield _row("" if number else "template", line)
        for split in self.splits.values():
            yield from ("", f"{split.name}: {split.source or split.report.note}")
            yield from _split_lines(split, self.overlong)
        yield ""
        warnings = self.warnings + [text for split in self.splits.values() for text in split.warnings()]
        yield from (f"warning: {text}" for text in warnings)
        yield from (f"problem: {text}" for text in self.problems)
        yield from self._fault_lines()

    def _fault_lines(self) -> Iterator[str]:
        if not self.reasons:
            yield "no faults"
            return
        count = self.reasons.total()
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.reasons.items()))
        yield f"faults: {count} ({reasons}); {self._consequence()}"
        for split, fault in self.faults:
            where = f"{fault.origin}: {fault.field}" if fault.field else fault.origin
            yield f"  {where}  ({split})"
            yield f"    found:    {fault.found}"
            yield f"    expected: {fault.expected}"
            if fault.mend:
                yield f"    mend:     {fault.mend}"
        if count > len(self.faults):
            yield f"  ... and {count - len(self.faults)} more (--limit shows more of them)"

    def _consequence(self) -> str:
        if self.on_error == "skip" and self.overlong != "raise":
            return "a run leaves these records out (on_error: skip)"
        return f"a run stops at them (on_error: {self.on_error}, overlong: {self.overlong})"


def _split_lines(split: SplitCheck, overlong: str) -> Iterator[str]:
    report = split.report
    if split.source:
        yield _row("records", f"{report.records:,}, {report.skipped.total():,} of them faulty")
    text = f"{report.examples:,}, {report.tokens:,} tokens"
    if report.trained:
        text += f", trained weight {report.trained:,.10g} ({report.trained / report.tokens:.2f} a token)"
    yield _row("examples", text)
    if split.source and report.note:
        yield _row("", report.note)
    if split.max_length is not None:
        yield _row("max_length", f"{split.max_length:,}: {split.too_long:,} longer{_overlong(split, overlong)}")
    if split.ends is not None:
        yield _row("end of turn", f"trained in {split.ends[0]:,} of {split.ends[1]:,} sequences")
    if split.spreads:
        names = ("min", "p50", "p90", "p99", "max")
        yield _row("lengths", "".join(f"{name:>8}" for name in names) + "   (tokens, before anything is cut)")
    for name, spread in split.spreads.items():
        yield _row(f"  {name}", "".join(f"{value:>8,}" for value in vars(spread).values()))
    yield from _cost_lines(split)


def _overlong(split: SplitCheck, overlong: str) -> str:
    if not split.too_long:
        return ""
    if overlong == "raise":
        return " (overlong: raise; each is a fault)"
    counts = [*split.report.dropped.items()], [*split.report.cut.items()]
    told = [", ".join(f"{number:,} {reason}" for reason, number in sorted(pairs)) for pairs in counts]
    parts = [f"dropped: {told[0]}"] * bool(told[0]) + [f"cut: {told[1]}"] * bool(told[1])
    return f" (overlong: {overlong}{'; ' * bool(parts)}{'; '.join(parts)})"


def _cost_lines(split: SplitCheck) -> Iterator[str]:
    cost = split.cost
    if cost is None:
        if split.steps:
            yield _row("epoch", f"{split.steps:,} batches of prompts; nothing is laid out before they are answered")
        return
    parts = f"{cost.parts:,} micro-batches, over all ranks" if cost.parts > 1 else "one micro-batch"
    yield _row("epoch", f"{cost.steps:,} step{'s' * (cost.steps > 1)} of up to {cost.examples:,} examples, in {parts}")
    padding = cost.padded - cost.useful - cost.repeated
    waste = f", {_share(cost.repeated, cost.padded)} repeated prompts" * (cost.repeated > 0)
    packed = f"{cost.packed:>12,} tokens computed, {_share(cost.useful, cost.packed)} useful"
    padded = f"{cost.padded:>12,} tokens computed, {_share(cost.useful, cost.padded)} useful"
    rows = {
        "packed": f"{packed}; largest micro-batch {cost.largest_packed:,}",
        "padded": f"{padded}{waste}, {_share(padding, cost.padded)} padding; largest {cost.largest_padded:,}",
    }
    for name, text in rows.items():
        yield _row(f"  {name}", text + " (configured)" * (name == split.layout))
    if cost.repeated:
        whole = cost.useful + cost.repeated
        saved = f"{cost.repeated:,} tokens ({_share(cost.repeated, whole)} of {whole:,}) are not computed twice"
        yield _row("prompts", f"shared by their answers: {saved}")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _row(label: str, text: str) -> str:
    return f"  {label:<{WIDTH}}  {text}"
