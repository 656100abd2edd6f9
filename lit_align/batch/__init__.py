"""The data contract between data modules, rollouts and stages: types, layouts (packing) and step plans."""

from lit_align.batch.loader import PlannedLoader, outlive_sigterm, sigterm_held
from lit_align.batch.packing import LayOut, pack, pad
from lit_align.batch.parts import example_parts, token_parts
from lit_align.batch.plan import MicroPlan, epoch_order, plan_epoch, plan_step, split_step
from lit_align.batch.types import (
    IGNORE_INDEX,
    Branch,
    Example,
    MicroBatch,
    PromptBatch,
    Scored,
    Segment,
    StepTotals,
)

__all__ = [
    "IGNORE_INDEX",
    "Branch",
    "Example",
    "LayOut",
    "MicroBatch",
    "MicroPlan",
    "PlannedLoader",
    "PromptBatch",
    "Scored",
    "Segment",
    "StepTotals",
    "epoch_order",
    "example_parts",
    "outlive_sigterm",
    "pack",
    "pad",
    "plan_epoch",
    "plan_step",
    "sigterm_held",
    "split_step",
    "token_parts",
]
