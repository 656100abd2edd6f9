"""All wrong edits of the source, each with the test that has to notice it.

Adding one: break a line in a way that a person might, and name the test whose job it is to turn red.
"""

from __future__ import annotations

from tests.mutation import (
    edits_advantages,
    edits_forward,
    edits_losses,
    edits_memory,
    edits_preference,
    edits_quantization,
    edits_rollout,
)

EDITS = [
    *edits_losses.EDITS,
    *edits_preference.EDITS,
    *edits_advantages.EDITS,
    *edits_rollout.EDITS,
    *edits_forward.EDITS,
    *edits_memory.EDITS,
    *edits_quantization.EDITS,
]
