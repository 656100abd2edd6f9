"""What this project's attention wants to know about a packed row, from the lengths of its documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_align.batch import Branch, Example, StepTotals, pack


def attention_arguments(lengths: Sequence[int], device: str = "cpu") -> dict[str, Any]:
    """The keyword argument of `packed_attention` for documents that lie end to end.

    It is taken from a micro-batch that the project itself packs, so that it is what training hands over.
    """
    documents = [
        Example(torch.zeros(0, dtype=torch.long), (Branch(torch.zeros(n).long(), torch.ones(n)),)) for n in lengths
    ]
    batch = pack(documents, range(len(documents)), StepTotals(1.0, 1.0)).to(device)
    return {"varlen": batch.varlen}
