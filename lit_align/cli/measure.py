"""Losses and gradients of optimizer steps, taken down to be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_align.models.modes import disable_dropout
from lit_align.stages.stage import Stage


@dataclass
class Measurement:
    """What was seen of each optimizer step.

    Attributes:
        losses: As logged, over all ranks and micro-batches.
        gradients: Of each trained parameter, before clipping, on the CPU.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


class Difference(NamedTuple):
    """Largest relative differences over all steps.

    Attributes:
        loss: Of a step's loss, relative to it; below a loss of 0.01 relative to 0.01.
        gradient: Of any element of the gradient, relative to the step's largest one.
    """

    loss: float
    gradient: float


class StepRecorder(Callback):
    """Takes down every optimizer step; dropout is turned off, since every split would draw other masks."""

    def __init__(self) -> None:
        super().__init__()
        self.measured = Measurement()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turns dropout off."""
        assert isinstance(pl_module, Stage)
        for _, network in pl_module.networks(pl_module.trained):
            disable_dropout(network)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Takes the step down; the stage's own hook, which begins the means anew, comes after."""
        assert isinstance(pl_module, Stage)
        self.measured.losses.append(pl_module.train_means.compute()["loss"])
        named = ((name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None)
        self.measured.gradients.append({name: grad.detach().float().cpu().clone() for name, grad in named})


def compare(whole: Measurement, other: Measurement) -> Difference:
    """How far two measurements of the same steps are apart.

    Raises:
        ValueError: They are not of the same parameters or steps.
    """
    if [g.keys() for g in whole.gradients] != [g.keys() for g in other.gradients]:
        raise ValueError("the splits made different steps, or trained different parameters")
    losses = [abs(a - b) / max(abs(a), 0.01) for a, b in zip(whole.losses, other.losses, strict=True)]
    return Difference(_largest(losses), _largest(list(map(_apart, whole.gradients, other.gradients))))


def _largest(values: list[float]) -> float:
    """Infinite if a value is no number: what is NaN agrees with nothing."""
    return max(values) if all(map(math.isfinite, values)) else math.inf


def _apart(whole: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    largest = _largest([float(gradient.abs().max()) for gradient in whole.values()])
    apart = _largest([float((gradient - other[name]).abs().max()) for name, gradient in whole.items()])
    return apart / max(largest, torch.finfo(torch.float32).tiny) if math.isfinite(largest) else math.inf
