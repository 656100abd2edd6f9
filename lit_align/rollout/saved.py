"""Examples as a few flat tensors and back: a rollout that was only half used goes into the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_align.batch import Branch, Example


def pack_examples(examples: Sequence[Example]) -> dict[str, Any]:
    """Plain types and tensors that hold the examples, bit for bit.

    Args:
        examples: At least one; their branches carry the same numbers per token, and they have no values.
    """
    branches = [branch for example in examples for branch in example.branches]
    return {
        "prefix_sizes": _sizes([example.prefix_ids for example in examples]),
        "prefix_ids": torch.cat([example.prefix_ids for example in examples]),
        "num_branches": torch.tensor([len(example.branches) for example in examples]),
        "branch_sizes": _sizes([branch.input_ids for branch in branches]),
        "input_ids": torch.cat([branch.input_ids for branch in branches]),
        "weights": torch.cat([branch.weights for branch in branches]),
        "tokens": {name: torch.cat([branch.tokens[name] for branch in branches]) for name in branches[0].tokens},
    }


def unpack_examples(state: dict[str, Any]) -> list[Example]:
    """The inverse of `pack_examples`."""
    sizes = state["branch_sizes"].tolist()
    columns = {name: values.split(sizes) for name, values in state["tokens"].items()}
    rows = zip(state["input_ids"].split(sizes), state["weights"].split(sizes), strict=True)
    branches = [
        Branch(ids, weights, {name: parts[i] for name, parts in columns.items()})
        for i, (ids, weights) in enumerate(rows)
    ]
    stops = state["num_branches"].cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    prefixes = state["prefix_ids"].split(state["prefix_sizes"].tolist())
    return [Example(ids, tuple(branches[a:b])) for ids, a, b in zip(prefixes, starts, stops, strict=True)]


def _sizes(parts: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(part) for part in parts])
