"""Examples as the padded dictionaries that trainers know: for comparisons, and for models that need rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_align.batch import IGNORE_INDEX, Branch, Example

if TYPE_CHECKING:
    from datamodules.examples import Collate


def language_dictionary(examples: Sequence[Example], collate: Collate, pad_to: int | None) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of examples with one branch, int64 [B, T]."""
    return _rectangle([_sequence(example, example.branches[0]) for example in examples], collate, pad_to)


def reward_dictionary(pairs: Sequence[Example], collate: Collate) -> dict[str, Tensor]:
    """input_ids_chosen, attention_mask_chosen and the same for rejected, int64 [B, T], T of each side its own."""
    sides = {"chosen": _side(pairs, 0, collate), "rejected": _side(pairs, 1, collate)}
    return {f"{name}_{side}": sides[side][name] for side in sides for name in ("input_ids", "attention_mask")}


def dpo_dictionary(pairs: Sequence[Example], collate: Collate) -> dict[str, Tensor]:
    """Ids, masks and labels of chosen and rejected with the prompt before them, and ids and mask of the prompt."""
    sides = {"chosen": _side(pairs, 0, collate), "rejected": _side(pairs, 1, collate)}
    prompt = _rectangle([(pair.prefix_ids, pair.prefix_ids) for pair in pairs], collate)
    names = ("input_ids", "attention_mask", "labels")
    result = {f"{side}_{name}": sides[side][name] for side in sides for name in names}
    return result | {f"prompt_{name}": prompt[name] for name in names[:2]}


def concatenated_dictionary(pairs: Sequence[Example], collate: Collate) -> dict[str, Tensor]:
    """concatenated_input_ids, _attention_mask and _labels, int64 [2B, T]: the chosen first, then the rejected."""
    rows = [_sequence(pair, pair.branches[side]) for side in (0, 1) for pair in pairs]
    return {f"concatenated_{name}": values for name, values in _rectangle(rows, collate).items()}


def _side(pairs: Sequence[Example], side: int, collate: Collate) -> dict[str, Tensor]:
    return _rectangle([_sequence(pair, pair.branches[side]) for pair in pairs], collate)


def _sequence(example: Example, branch: Branch) -> tuple[Tensor, Tensor]:
    """Ids and labels of a branch with its prefix before it."""
    ids = torch.cat([example.prefix_ids, branch.input_ids])
    labels = torch.where(branch.weights > 0, branch.input_ids, IGNORE_INDEX)
    return ids, torch.cat([torch.full_like(example.prefix_ids, IGNORE_INDEX), labels])


def _rectangle(rows: Sequence[tuple[Tensor, Tensor]], collate: Collate, pad_to: int | None = None) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    columns = pad_to or longest
    if columns < longest:
        raise ValueError(f"pad_to: expected at least {longest}, the longest example, got {pad_to}")
    input_ids = torch.full((len(rows), columns), collate.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (ids, row_labels) in enumerate(rows):
        here = slice(columns - len(ids), None) if collate.padding_side == "left" else slice(0, len(ids))
        input_ids[i, here], attention_mask[i, here], labels[i, here] = ids, 1, row_labels
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
