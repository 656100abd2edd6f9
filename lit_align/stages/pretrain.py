"""Pre-training (PT): next-token cross-entropy over blocks of running text."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_align.batch import MicroBatch
from lit_align.losses import weighted_nll
from lit_align.models import TokenStats, token_loss
from lit_align.models.source import ModelSource
from lit_align.stages.optim import WarmupCosine
from lit_align.stages.policy import PolicyStage
from lit_align.stages.stage import SchedulerCallable


class LitPretrain(PolicyStage):
    """Trains a language model on plain text; every token but the first of a block is predicted.

    Loss: sum over tokens of -log p(token | tokens before it), divided by the tokens of the optimizer step.

    Args:
        policy: Where the language model comes from; `config` starts one from scratch.
        optimizer: Built from the trainable parameters.
        lr_scheduler: Built from the optimizer and the number of steps of the run.
    """

    name = "pt"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "entropy", "token_accuracy")

    def __init__(
        self,
        policy: ModelSource,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0, fused=True),
        lr_scheduler: SchedulerCallable = lambda o, n: WarmupCosine(o, n),
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Shifted cross-entropy of one micro-batch, as its share of the step's mean."""
        return self.scaled(token_loss(self.policy, batch, self._nll), batch.totals.tokens)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Records the same loss."""
        token_loss(self.policy, batch, self._nll)

    test_step = validation_step

    def _nll(self, stats: TokenStats, part: MicroBatch) -> Tensor:
        """Summed over a part of the micro-batch's tokens."""
        weights = part.scored.weights
        loss = weighted_nll(stats.logps, weights)
        count = weights.sum()
        self.record(
            loss=(loss, count),
            entropy=((stats.entropy * weights).sum(), count),
            token_accuracy=((stats.correct * weights).sum(), count),
        )
        return loss
