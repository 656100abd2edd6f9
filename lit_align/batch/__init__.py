"""The data contract between data modules, rollouts and stages: types, layouts (packing) and step plans."""

from lit_align.batch.loader import PlannedLoader, outlive_sigterm, sigterm_held
from lit_align.batch.packing import LayOut, pack, pad
from lit_align.batch.parts import example_parts, token_parts
from lit_align.batch.plan import MicroPlan, epoch_order, plan_epoch, plan_step, split_step
from lit_align.batch.types import (
    IGNORE_INDEX,
    Branch,
    Example,
    KeyGather,
    MicroBatch,
    PromptBatch,
    Scored,
    Segment,
    StepTotals,
    Varlen,
)
from lit_align.batch.varlen import varlen
from lit_align.batch.work import Work

__all__ = [
    "IGNORE_INDEX",
    "Branch",
    "Example",
    "KeyGather",
    "LayOut",
    "MicroBatch",
    "MicroPlan",
    "PlannedLoader",
    "PromptBatch",
    "Scored",
    "Segment",
    "StepTotals",
    "Varlen",
    "Work",
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
    "varlen",
]
