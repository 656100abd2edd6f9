"""Renders `results/*.json` as Markdown, so that a table cannot drift from what was measured.

Usage: python -m benchmarks.table [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import CASES, REPOSITORY

HEADER = """| case | useful tokens/s | of the floor | faster than TRL as shipped (A) | its best flags (B) \
| B with our attention (C) | memory above the weights: ours, TRL's fastest |
|---|---|---|---|---|---|---|"""
GROWTH = """| cost | against | measured exponent | expected |
|---|---|---|---|"""


def render(folder: Path) -> str:
    """The tables of a folder of results; empty where nothing has been measured."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    cases = [results[name] for name in CASES if name in results]
    parts = []
    if cases:
        parts.append("\n".join([HEADER, *map(row, cases), "", *under(cases)]))
    if growth := results.get("growth"):
        parts.append("\n".join([GROWTH, *map(growth_row, growth["curves"])]))
    return "\n\n".join(parts)


def row(result: dict[str, Any]) -> str:
    """One case."""
    ours, columns = result["ours"], {result["peers"][v]["column"]: v for v in result["best"]}
    fastest = max(result["best"], key=lambda v: result["peers"][v]["tokens_per_second"], default=None)
    cells = [
        result["case"],
        spread(ours),
        f"{ours['ratio_to_floor']:.0%}",
        *(ratio(result, columns.get(column)) for column in "ABC"),
        f"{mebi(ours)}, {mebi(result['peers'][fastest])} MiB" if fastest else f"{mebi(ours)} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def spread(side: dict[str, Any]) -> str:
    """Tokens per second, and p10 to p90 of the steps."""
    steps = side["step_tokens_per_second"]
    return f"{side['tokens_per_second']:.0f} ({steps['p10']:.0f} to {steps['p90']:.0f})"


def ratio(result: dict[str, Any], variant: str | None) -> str:
    """By how much ours is faster, and than what."""
    if variant is None:
        return "–"
    faster = result["peers"][variant]["ours_is_faster"]
    return f"{faster['median']:.2f}x ({variant})"


def mebi(side: dict[str, Any]) -> str:
    """MiB above the weights."""
    return f"{side['peak_bytes_above_weights'] / 2**20:.0f}"


def under(cases: list[dict[str, Any]]) -> list[str]:
    """What stands below the table: machine, versions, what gave no number."""
    lines = []
    for machine in sorted({describe(case) for case in cases}):
        lines.append(machine)
    for case in cases:
        for variant, peer in case["peers"].items():
            if peer["faults"]:
                lines.append(f"{case['case']}, {variant}: no number ({peer['faults'][0].splitlines()[0]}).")
    return lines


def describe(case: dict[str, Any]) -> str:
    """Machine and versions of a case, in a sentence."""
    machine, peers = case["machine"], [p for p in case["peers"].values() if "versions" in p]
    trl = sorted({peer["versions"]["trl"] for peer in peers})
    return (
        f"{machine.get('gpu', machine['cpu'])}, {case['ours']['threads']} threads, {case['settings']['dtype']}; torch "
        f"{case['ours']['versions']['torch']}, transformers {case['ours']['versions']['transformers']}"
        f"{''.join(f', TRL {version}' for version in trl)}; {case['date']}."
    )


def growth_row(curve: dict[str, Any]) -> str:
    """One curve."""
    sizes = ", ".join(str(size) for size in curve["sizes"])
    return f"| {curve['cost']} | {curve['against']} ({sizes}) | {curve['slope']:.2f} | {curve['expected']:.2f} |"


if __name__ == "__main__":
    print(render(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "benchmarks" / "results"))
