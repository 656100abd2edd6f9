"""Reward modelling (RM): a scalar that is larger for the answer that people preferred."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.batch import MicroBatch
from lit_align.losses import pairwise_reward_loss
from lit_align.models import scalar_at_ends
from lit_align.models.flops import Flops, training_flops
from lit_align.models.load import load_scalar_model, load_tokenizer
from lit_align.models.modes import disable_dropout
from lit_align.models.scalar import HEAD
from lit_align.models.source import ModelSource
from lit_align.stages.optim import WarmupCosine
from lit_align.stages.stage import SchedulerCallable, Stage


class LitReward(Stage):
    """Trains a reward model on preference pairs with the pairwise log loss.

    Loss: -log sigmoid(r(prompt, chosen) - r(prompt, rejected) - margin), mean over the pairs of the optimizer step
    (InstructGPT, arXiv:2203.02155, eq. 1; margin: Llama 2, arXiv:2307.09288, eq. 2). r is a linear head in float32
    on the last token of the answer. Dropout is off.

    Args:
        reward_model: Where the network comes from: a language model (the head is new) or an earlier reward model.
        center_coef: Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv:2312.09244); 0 = off.
        optimizer: Built from the trainable parameters.
        lr_scheduler: Built from the optimizer and the number of steps of the run.
    """

    name = "rm"
    trained: ClassVar[tuple[str, ...]] = ("reward_model",)
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin", "reward_mean", "reward_square")
    progress: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def __init__(
        self,
        reward_model: ModelSource,
        center_coef: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0, fused=True),
        lr_scheduler: SchedulerCallable = lambda o, n: WarmupCosine(o, n),
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.reward_model_source, self.center_coef = reward_model.validate("reward_model", trained=True), center_coef
        self.reward_model = None

    def sources(self) -> dict[str, ModelSource]:
        """The reward model's source."""
        return {"reward_model": self.reward_model_source}

    def configure_model(self) -> None:
        """Builds the reward model, once."""
        if self.reward_model is None:
            self.tokenizer = self.with_data_template(load_tokenizer(self.reward_model_source, "reward_model"))
            self.reward_model = load_scalar_model(self.reward_model_source, "reward_model")
            disable_dropout(self.reward_model)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Pairwise log loss of the micro-batch's pairs, as its share of the step's mean."""
        return self.scaled(self._loss(batch), batch.totals.examples)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Records the same loss."""
        self._loss(batch)

    test_step = validation_step

    def _loss(self, batch: MicroBatch) -> Tensor:
        rewards = scalar_at_ends(self.reward_model, batch)  # [S]
        chosen, rejected = rewards[batch.groups[:, 0]], rewards[batch.groups[:, -1]]  # [B]
        losses = pairwise_reward_loss(chosen, rejected, batch.values.get("margin"), self.center_coef)
        loss = (losses * batch.values.get("weight", torch.ones_like(losses))).sum()
        pairs = batch.num_examples
        self.record(
            loss=(loss, pairs),
            accuracy=((chosen > rejected).float().sum(), pairs),
            margin=((chosen - rejected).sum(), pairs),
            reward_mean=((chosen + rejected).sum(), 2 * pairs),
            reward_square=((chosen.square() + rejected.square()).sum(), 2 * pairs),
        )
        return loss

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Turns the mean square into the rewards' standard deviation."""
        if "reward_square" in means:
            variance = means.pop("reward_square") - means["reward_mean"] ** 2
            means["reward_std"] = max(variance, 0.0) ** 0.5
        return means

    def step_flops(self) -> Flops:
        """Forward and backward pass; the head sees the end of each sequence only."""
        return training_flops(self.reward_model, "ends")

    def on_predict_start(self) -> None:
        """Says so if the head is still the one that training begins with: each reward would be 0."""
        heads = [p for name, p in self.reward_model.named_parameters() if f".{HEAD}." in f".{name}"]
        if not any(bool(head.any()) for head in heads):
            rank_zero_warn(
                "reward_model: its head is new, so every reward is 0; give a trained one (--ckpt_path, or "
                "reward_model.path: the folder that a reward model was exported to)"
            )

    def predict_step(self, batch: MicroBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row per example: its index and the reward of each answer."""
        rewards = scalar_at_ends(self.reward_model, batch)[batch.groups].tolist()
        return [{"index": i, "rewards": row} for i, row in zip(batch.indices.tolist(), rewards, strict=True)]
