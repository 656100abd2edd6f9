"""A packed row as a padded rectangle, for trunks that cannot take the row: recurrent ones, attention of another kind.

The trunk alone sees the rectangle; its hidden states are put back where the packed row has them, so that everything
after the trunk stays as it is. Each branch has a row of its own, with its prefix before it: the prefix is computed
once for each branch, which is what packing saves.
"""

from __future__ import annotations

from functools import cache, lru_cache
from logging import getLogger
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.batch import Segment

log = getLogger(__name__)


class Rectangle(NamedTuple):
    """Where the tokens of a packed row go, and where they come back from.

    Attributes:
        sources: Position in the packed row, int64 [rows, columns]; 0 at padding.
        attention_mask: 1 = real token, 0 = padding (on the right), int64 [rows, columns].
        places: Flat place in the rectangle of each position of the packed row, int64 [T]; a prefix is read off the
            row of its first branch.
    """

    sources: Tensor
    attention_mask: Tensor
    places: Tensor

    def to(self, device: torch.device) -> Rectangle:
        """A copy on another device."""
        return Rectangle(*(tensor.to(device, non_blocking=True) for tensor in self))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what validation leaves in the cache has to serve training too
def rectangle(segments: tuple[Segment, ...]) -> Rectangle:
    """Lays the segments of a packed row out as a padded rectangle, on the CPU.

    Args:
        segments: Of one packed row, which they cover; a prefix stands before the first branch that hangs from it.
    """
    prefixes = {(s.prefix_start, s.prefix_stop) for s in segments if s.prefix_stop > s.prefix_start}
    branches = [s for s in segments if (s.start, s.stop) not in prefixes]
    sizes = [s.prefix_stop - s.prefix_start + s.stop - s.start for s in branches]
    shape = (len(branches), max(sizes))
    sources, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    places = torch.full((max(s.stop for s in segments),), -1)
    for row, (branch, size) in enumerate(zip(branches, sizes, strict=True)):
        tokens = torch.cat(
            [torch.arange(branch.prefix_start, branch.prefix_stop), torch.arange(branch.start, branch.stop)]
        )
        sources[row, :size], attention_mask[row, :size] = tokens, 1
        here = row * shape[1] + torch.arange(size)
        places[tokens] = torch.where(places[tokens] < 0, here, places[tokens])
    return Rectangle(sources, attention_mask, places)


@cache
def tell_unpacked(trunk: str, attention: str) -> None:
    """Says once for each kind of trunk that packed batches are padded for it.

    Args:
        trunk: Its class.
        attention: Its attention.
    """
    log.warning(
        "%s with attention %r cannot take packed rows: each micro-batch is padded before its trunk, and a prefix is "
        "computed once for each of its branches; the results are the same",
        trunk,
        attention,
    )
