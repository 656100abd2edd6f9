"""What the stages share: optimizer, contents of a checkpoint, exact logging. It calls nothing of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from lit_align.models.checkpoint import ENTRY, checkpoint_entry
from lit_align.models.fingerprint import base_fingerprint, fingerprint
from lit_align.models.flops import Flops, training_flops
from lit_align.models.modes import has_adapters
from lit_align.models.sameness import check_same_networks
from lit_align.models.source import ModelSource
from lit_align.stages.metrics import Means
from lit_align.stages.optim import check_takes_shards, optimizer_settings
from lit_align.stages.positions import check_positions
from lit_align.stages.precision import check_precision, check_unscaled, clip_gradients
from lit_align.stages.progress import (
    begin_next_epoch,
    check_validation_interval,
    check_whole_steps,
    follow_epoch_length,
    recount,
    tell_loader,
    total_steps,
)

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]


class Stage(LightningModule):
    """Thin common parent of the stages.

    Attributes:
        name: Short name of the stage; names its run folder.
        trained: Attributes that hold trained networks, main one first.
        frozen: Attributes that hold frozen networks: not in the checkpoint, but their fingerprints are.
        metrics: Names of the values that the stage records.
        progress: Those of them that the progress bar shows.
    """

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    frozen: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]]
    progress: ClassVar[tuple[str, ...]] = ("loss",)

    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: SchedulerCallable) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.train_means, self.val_means = Means(self.metrics), Means(self.metrics)
        self._optimizer_settings: dict[str, str] = {}
        self._stored_optimizer: dict[str, str] | None = None

    def setup(self, stage: str) -> None:
        """Refuses what would cast more than networks, and what ranks would not do together; before loading."""
        check_precision(self.trainer.precision_plugin.precision)
        check_validation_interval(self.trainer)
        if self.tokenizer is not None:  # networks that were built before
            self.with_data_template(self.tokenizer)

    def with_data_template(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that the data module rendered with: what ends turns is said there.

        A data module has to choose one where the tokenizer has none, and it may have been given another tokenizer.
        """
        data = None if self._trainer is None else self.trainer.datamodule
        template = getattr(getattr(data, "tokenizer", None), "chat_template", None)
        if template:
            tokenizer.chat_template = template
        return tokenizer

    # -- optimisation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is built from: the trainable parameters, in one group."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> dict[str, Any]:
        """The configured optimizer, and its schedule over the steps of the run."""
        optimizer = self.optimizer(self.parameter_groups())
        check_takes_shards(optimizer)
        check_unscaled(self.trainer, optimizer)
        self._optimizer_settings = optimizer_settings(optimizer)
        self._check_same_optimizer()
        scheduler = self.lr_scheduler(optimizer, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips as the trainer says; see `clip_gradients`."""
        clip_gradients(self.trainer, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def scaled(self, total: Tensor, normaliser: float) -> Tensor:
        """The one place where a loss is scaled.

        Args:
            total: Sum of the loss over the items of this micro-batch.
            normaliser: Number of items of the whole optimizer step, over all ranks and micro-batches.

        Returns:
            `total / normaliser`, times what Lightning (accumulation) and DDP or FSDP (ranks) will divide by.
        """
        averaged_over = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return total * (averaged_over / max(normaliser, 1e-12))

    def step_flops(self) -> Flops:
        """What each unit of a micro-batch's work costs in `training_step` and its backward pass: model FLOPs."""
        return sum((training_flops(net) for _, net in self.networks(self.trained)), Flops())

    # -- logging

    def record(self, **sums: tuple[Tensor | float, Tensor | float]) -> None:
        """Adds (sum, weight) of each value to the running split's means; see `Means.update`."""
        (self.train_means if self.trainer.training else self.val_means).update(**sums)

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, made from the means; a stage derives further values (a spread, say) here."""
        return means

    def on_fit_start(self) -> None:
        """Refuses sequences that are too long for a network, if the data module knows how long they are."""
        if (longest := getattr(self.trainer.datamodule, "longest", None)) is not None:
            networks = self.networks(self.trained + self.frozen)
            check_positions(networks, longest(), self.tokens_to_sample())

    def tokens_to_sample(self) -> int:
        """How many tokens training may put behind a sequence of the data."""
        return 0

    def on_train_start(self) -> None:
        """Mends what Lightning's own resume leaves open."""
        check_whole_steps(self.trainer)
        begin_next_epoch(self.trainer)
        tell_loader(self.trainer)
        follow_epoch_length(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Keeps Lightning's count of the epoch's micro-batches right."""
        tell_loader(self.trainer)  # the loader may be a new one
        follow_epoch_length(self.trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step's means, if this step is one that is logged."""
        # The number that logged values get: after some resumes Lightning counts a step twice.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        every = self.trainer.log_every_n_steps  # 0 = never
        if every > 0 and (self.trainer.global_step + 1) % every == 0:
            self._log("train", self.train_means.compute())
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of shards: the ranks' parts put together
            self.log("train/grad_norm", norm.detach())
        self.train_means.reset()

    def on_validation_epoch_start(self) -> None:
        """Starts the validation means afresh."""
        self.val_means.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation means."""
        self._log("val", self.val_means.compute())

    def on_test_epoch_start(self) -> None:
        """Starts the test means afresh."""
        self.val_means.reset()

    def on_test_epoch_end(self) -> None:
        """Logs the test means."""
        self._log("test", self.val_means.compute())

    def _log(self, split: str, means: dict[str, float]) -> None:
        for name, value in self.summarise(means).items():
            # On the host: Lightning reads what its progress bar shows back at every micro-batch.
            self.log(f"{split}/{name}", torch.tensor(value), prog_bar=name in self.progress, rank_zero_only=False)

    # -- checkpoints

    def sources(self) -> dict[str, ModelSource]:
        """Where each trained network comes from, by attribute name."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its networks come from")

    def roles(self) -> dict[str, tuple[ModelSource, nn.Module]]:
        """Source and network of each trained role, by attribute name."""
        return {name: (self.sources()[name], net) for name, net in self.networks(self.trained)}

    def networks(self, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
        """Those of the named attributes that hold a network."""
        return ((name, net) for name in names if isinstance(net := getattr(self, name, None), nn.Module))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What training changes: no frozen network, no frozen base under adapters."""
        left_out = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if k not in left_out and k.split(".")[0] not in self.frozen}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave; strict about everything that it holds."""
        expected = set(self.state_dict())
        missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
        if strict and (missing or unexpected):
            raise ValueError(
                f"the checkpoint is not one of this model: {len(missing)} weights are missing in it "
                f"({missing[:3]}), {len(unexpected)} are unknown ({unexpected[:3]}); "
                "start it with the configuration that it was made with"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where the networks came from and the fingerprints of the frozen ones; plain types only."""
        checkpoint[ENTRY] = checkpoint_entry(self.name, self.roles(), self.tokenizer, self.fingerprints())
        checkpoint[ENTRY]["micro_batches"] = self.trainer.accumulate_grad_batches
        checkpoint[ENTRY]["optimizer"] = self._optimizer_settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other networks than the run began with; counts in this run's micro-batches."""
        entry, roles = checkpoint.get(ENTRY, {}), self.roles()
        check_same_networks(entry, self.name, roles, self.tokenizer, self.fingerprints())
        self._stored_optimizer = entry.get("optimizer")
        self._check_same_optimizer()  # sharded, the optimizer is there before the checkpoint is read
        before = entry.get("micro_batches")
        if before is not None and self._trainer is not None:
            recount(checkpoint, before, self.trainer.accumulate_grad_batches)

    def _check_same_optimizer(self) -> None:
        """Refuses other settings than the run began with: those of the checkpoint would be used, without a word."""
        now = self._optimizer_settings
        stored = self._stored_optimizer or now
        if changed := [k for k in now if k in stored and stored[k] != now[k]]:
            raise ValueError(
                "the checkpoint cannot be resumed with another optimizer: "
                + "; ".join(f"{key}: the run began with {stored[key]}, now it is {now[key]}" for key in changed)
                + ". Restore it, or begin a new run from the exported weights"
            )

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each frozen network and of each frozen base under adapters; computed once."""
        if not hasattr(self, "_fingerprints"):
            self._fingerprints = {name: fingerprint(net) for name, net in self.networks(self.frozen)}
            adapted = ((n, net) for n, net in self.networks(self.trained) if has_adapters(net))
            self._fingerprints |= {f"{name}.base": base_fingerprint(net) for name, net in adapted}
        return self._fingerprints
