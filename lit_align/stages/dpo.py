"""Direct preference optimisation (DPO) and its family: preferences without a reward model."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.batch import MicroBatch
from lit_align.losses import PreferenceLogps, PreferenceLoss, Sigmoid, chosen_nll
from lit_align.models import TokenStats, example_loss, sequence_lengths, sequence_sums, token_logps, token_stats
from lit_align.models.flops import Flops, forward_flops
from lit_align.models.modes import disable_dropout
from lit_align.models.reference import make_reference
from lit_align.models.source import ModelSource
from lit_align.stages.cached_reference import cached_reference
from lit_align.stages.optim import WarmupCosine
from lit_align.stages.policy import ReferencedStage, reference_policy
from lit_align.stages.stage import SchedulerCallable


class LitDPO(ReferencedStage):
    """Trains a policy on preference pairs against a frozen reference.

    Loss: `loss(pairs)`, mean over the pairs of the optimizer step; by default
    -log sigmoid(beta * ((pi_c - ref_c) - (pi_r - ref_r))) with summed log-probabilities of the responses
    (arXiv:2305.18290, eq. 7). At the first step it is ln 2, exactly. Dropout is off.

    Args:
        policy: Where the language model comes from.
        loss: The member of the family, by class path; holds beta.
        reference: Where the reference comes from; None = where the policy comes from (with LoRA: adapters off).
        rpo_alpha: If set, the loss is rpo_alpha * loss + mean negative log-likelihood of the chosen response.
        reference_cache: Compute the reference's log-probabilities of all pairs once, at the start of training, and
            keep them in this folder, or (true) where tokenised data is kept; training then holds the policy alone.
        optimizer: Built from the trainable parameters.
        lr_scheduler: Built from the optimizer and the number of steps of the run.
    """

    name = "dpo"
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "entropy",
        "nll_loss",
    )
    progress: ClassVar[tuple[str, ...]] = ("loss", "rewards/accuracies")

    def __init__(
        self,
        policy: ModelSource,
        loss: PreferenceLoss = Sigmoid(beta=0.1),  # noqa: B008 (frozen, and jsonargparse shows it)
        reference: ModelSource | None = None,
        rpo_alpha: float | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0, fused=True),
        lr_scheduler: SchedulerCallable = lambda o, n: WarmupCosine(o, n),
        reference_cache: bool | str = False,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        self.loss, self.reference_source, self.rpo_alpha = loss, reference, rpo_alpha
        self.has_reference = not loss.reference_free
        self.cached = cached_reference(reference_cache, policy, reference, loss.reference_free)

    def configure_model(self) -> None:
        """Builds the policy, once, and its reference where that is not cached."""
        if self.policy is None:
            super().configure_model()
            disable_dropout(self.policy)
        if self._cache_serves():
            self.cached.anchor(self.policy, self.reference)
        elif self.has_reference and self.reference is None:
            self.reference = make_reference(self.policy, self.policy_source, self.reference_source)
            if self.cached is not None:
                self.cached.check(self.reference)

    def fingerprints(self) -> dict[str, str]:
        """The same whether the reference is in memory or cached, so that a run may go on either way."""
        cached = {} if self.cached is None else self.cached.fingerprints(self.policy)
        return super().fingerprints() | cached

    def _cache_serves(self) -> bool:
        """Whether the reference is a table: of training and validation data, so in training alone."""
        return self.cached is not None and (self._trainer is None or self.trainer.state.fn == "fit")

    def on_fit_start(self) -> None:
        """Readies a cached reference; says so when a loss that looks across pairs will see only a part of each step."""
        super().on_fit_start()
        if self.cached is not None:
            self.cached.prepare(self)
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if self.loss.couples_pairs and parts > 1:
            rank_zero_warn(
                f"{type(self.loss).__name__} compares the pairs of a micro-batch with each other, and each step is "
                f"split in {parts}: another split gives another update. Use one micro-batch on one device to avoid it."
            )

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Preference loss of the micro-batch's pairs, as its share of the step's mean."""
        return self.scaled(self._loss(batch), batch.totals.examples)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Records the same loss."""
        self._loss(batch)

    test_step = validation_step

    def step_flops(self) -> Flops:
        """Forward and backward pass of the policy, and the reference's forward pass unless it is cached."""
        cost = super().step_flops()
        if not self.has_reference or self._cache_serves():
            return cost
        frozen = self.policy if self.reference is None else self.reference
        return cost + forward_flops(frozen, adapters=self.reference is not None)

    def _loss(self, batch: MicroBatch) -> Tensor:
        batch = replace(batch, values=batch.values | self._reference_values(batch))
        if self.loss.couples_pairs:  # then there are no parts
            return self._loss_of_pairs(token_stats(self.policy, batch), batch)
        return example_loss(self.policy, batch, self._loss_of_pairs)

    def _loss_of_pairs(self, stats: TokenStats, part: MicroBatch) -> Tensor:
        """Summed over the pairs of a part of the micro-batch."""
        pairs = self._pairs(sequence_sums(stats.logps, part), part)
        losses = self.loss(pairs)  # [B]
        nll = chosen_nll(pairs.policy_chosen, pairs.chosen_lengths)
        if self.rpo_alpha is not None:
            losses = self.rpo_alpha * losses + nll
        loss = (losses * part.values.get("weight", torch.ones_like(losses))).sum()
        self._record(pairs, loss, nll, stats.entropy)
        return loss

    def _pairs(self, logps: Tensor, part: MicroBatch) -> PreferenceLogps:
        # An empty micro-batch has one column of groups, hence -1 for the second.
        chosen, rejected = part.groups[:, 0], part.groups[:, -1]
        lengths = sequence_lengths(part)
        return PreferenceLogps(
            logps[chosen],
            logps[rejected],
            part.values["reference_chosen"],
            part.values["reference_rejected"],
            lengths[chosen],
            lengths[rejected],
        )

    def _reference_values(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Summed log-probabilities under the reference, [B] each; they belong to the example, so a part has its own."""
        logps = self._reference_logps(batch)
        return {"reference_chosen": logps[batch.groups[:, 0]], "reference_rejected": logps[batch.groups[:, -1]]}

    @torch.no_grad()
    def _reference_logps(self, batch: MicroBatch) -> Tensor:
        if not self.has_reference:
            return sequence_sums(torch.zeros_like(batch.scored.weights), batch)
        if self._cache_serves():
            return self.cached.logps(self.trainer, batch)
        with reference_policy(self.policy, self.reference) as reference:
            return sequence_sums(token_logps(reference, batch), batch)

    def _record(self, pairs: PreferenceLogps, loss: Tensor, nll: Tensor, entropy: Tensor) -> None:
        chosen, rejected = self.loss.rewards(pairs)
        count = len(chosen)
        self.record(
            **{
                "loss": (loss, count),
                "rewards/chosen": (chosen.sum(), count),
                "rewards/rejected": (rejected.sum(), count),
                "rewards/accuracies": ((chosen > rejected).float().sum(), count),
                "rewards/margins": ((chosen - rejected).sum(), count),
                "logps/chosen": (pairs.policy_chosen.sum(), count),
                "logps/rejected": (pairs.policy_rejected.sum(), count),
                "entropy": (entropy.sum(), len(entropy)),
                "nll_loss": (nll.sum(), count),
            }
        )
