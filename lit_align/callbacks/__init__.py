"""Callbacks: exact resume, the run folder and what lies in it."""

from lit_align.callbacks.checkpoints import Checkpoints
from lit_align.callbacks.export import ExportHF
from lit_align.callbacks.hosts import OneRun
from lit_align.callbacks.meter import Meter
from lit_align.callbacks.predictions import PredictionRows
from lit_align.callbacks.preemption import Preemption
from lit_align.callbacks.random_state import RandomState
from lit_align.callbacks.run_folder import SaveRun
from lit_align.callbacks.samples import JudgeAnswers

__all__ = [
    "Checkpoints",
    "ExportHF",
    "JudgeAnswers",
    "Meter",
    "OneRun",
    "PredictionRows",
    "Preemption",
    "RandomState",
    "SaveRun",
]
