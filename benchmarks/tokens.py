"""The file of token ids that both sides read; the standard library alone, so that either side can."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def signature(row: dict[str, Any]) -> list[list[int]]:
    """An example as `meter.digest` takes it: each whole sequence, behind it the number of its trained tokens."""
    pairs = zip(row["branches"], row["weights"], strict=True)
    return [[*row["prompt"], *ids, sum(weight > 0 for weight in weights)] for ids, weights in pairs]


def unique_tokens(row: dict[str, Any]) -> int:
    """Tokens without padding, the prompt counted once."""
    return len(row["prompt"]) + sum(map(len, row["branches"]))


def scored_tokens(row: dict[str, Any]) -> int:
    """Tokens whose log-probability a loss needs; the first one of a row without a prompt cannot be predicted."""
    first = 0 if row["prompt"] else 1
    return sum(weight > 0 for weights in row["weights"] for weight in weights[first:])


def load_tokens(scratch: Path) -> list[dict[str, Any]]:
    """The examples that `prepare` wrote, in the order of the steps."""
    return json.loads((scratch / "tokens.json").read_text(encoding="utf-8"))


def by_step(rows: Sequence[Any], batch_size: int) -> list[Sequence[Any]]:
    """Rows of each step."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def forced_answers(prompts: Sequence[Sequence[int]], size: int, vocabulary: int) -> list[list[int]]:
    """Answers that depend on their prompt alone, so that both sides can be given the same: `size` random ids each."""
    return [random.Random(json.dumps(list(prompt))).choices(range(17, vocabulary - 1), k=size) for prompt in prompts]


def iterations(rows: Sequence[Any], batch_size: int, response_length: int) -> list[dict[str, int]]:
    """Tokens and prompts of each PPO iteration; every answer has the same length."""
    return [
        {"tokens": sum(len(row["prompt"]) + response_length for row in held), "examples": len(held)}
        for held in by_step(rows, batch_size)
    ]
