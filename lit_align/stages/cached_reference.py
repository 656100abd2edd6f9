"""A reference that is not in memory: its log-probabilities of the data are made at the start of training, or read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_align.batch import Example, MicroBatch, MicroPlan, PlannedLoader, StepTotals
from lit_align.models import sequence_sums, token_logps
from lit_align.models.fingerprint import fingerprint
from lit_align.models.modes import evaluating, has_adapters
from lit_align.models.reference import make_reference, reference_mode
from lit_align.models.reference_cache import (
    DamagedError,
    cache_folder,
    cache_key,
    describe_machine,
    describe_network,
    examples_digest,
    read_logps,
    sequence_logps,
    write_logps,
)
from lit_align.models.source import ModelSource

SAMPLE = 4
"""Examples of which a table that was read is computed again."""

TOLERANCES = {"float32": 1e-5, "float64": 1e-5}
"""By dtype of the weights: how far numbers may lie apart, relative to the larger of them and 1 nat."""

COARSE = 2e-2
"""The same where weights or precision have 16 bits or fewer: there the shape of a micro-batch alone changes as much."""


class CachedReference:
    """The reference of a policy as a table of what it says of every training and validation example.

    Args:
        cache: Folder of the files; True = the folder where tokenised data is kept.
        policy_source: Where the policy comes from.
        reference_source: Where the reference comes from; None = where the policy comes from.

    Raises:
        ValueError: The reference starts from scratch: it could not be built a second time.
    """

    def __init__(
        self, cache: bool | str, policy_source: ModelSource, reference_source: ModelSource | None = None
    ) -> None:
        if (reference_source or policy_source).config is not None:
            raise ValueError(
                "reference_cache: a network that starts from scratch lives nowhere to be read again when its "
                "log-probabilities are checked; leave reference_cache out, or give a path"
            )
        self.cache, self.policy_source, self.reference_source = cache, policy_source, reference_source
        self._network: dict[str, Any] = {}
        self._loaded: nn.Module | None = None
        self._tables: list[tuple[str, Sequence[Example], Tensor]] = []

    def anchor(self, policy: nn.Module, reference: nn.Module | None = None) -> None:
        """Notes once what the reference is.

        Args:
            policy: As it was built just now, with the weights of its start; not looked at if there is a reference.
            reference: The network itself if it is in memory already.
        """
        if self._network:
            return
        if reference is None and self.reference_source is not None:
            # Its weights have to be seen to be known; kept until training starts, where they may be needed.
            reference = self._loaded = make_reference(policy, self.policy_source, self.reference_source)
        self._network = describe_network(policy if reference is None else reference)

    def fingerprints(self, policy: nn.Module) -> dict[str, str]:
        """What a checkpoint would say of the reference if it were a network of its own."""
        own = self.reference_source is not None or not has_adapters(policy)
        return {"reference": self._network["fingerprint"]} if own and self._network else {}

    def check(self, reference: nn.Module | None) -> None:
        """Refuses a network that is not the one that was anchored.

        Raises:
            ValueError: The files that it was loaded from have changed since.
        """
        if reference is None or not self._network:
            return
        if (found := fingerprint(reference)) != self._network["fingerprint"]:
            raise ValueError(
                f"reference: its files have changed since the run began (fingerprint {found[:12]}, expected "
                f"{self._network['fingerprint'][:12]}); restore them"
            )

    def prepare(self, stage: LightningModule) -> None:
        """Reads the tables, or computes and writes them; every rank has to call it. No reference is held afterwards.

        Args:
            stage: With `policy` and `reference`, on its device, inside `trainer.fit`.

        Raises:
            ValueError: The data has no fixed examples, or a table is not what the reference says.
        """
        trainer, self._tables = stage.trainer, []
        loaders = fixed_loaders(trainer)
        with (
            isolate_rng(),
            torch.no_grad(),
            self._reference(stage) as network,
            trainer.precision_plugin.forward_context(),
        ):
            for split, loader in loaders.items():
                self._tables.append(self._table(split, loader, network, trainer))
        stage.reference = self._loaded = None

    def logps(self, trainer: Trainer, batch: MicroBatch) -> Tensor:
        """The reference's log-probability of each sequence, in nats, float64 [S] (float32 on MPS).

        Raises:
            ValueError: The trainer loads examples that no table is of.
        """
        loader = trainer.train_dataloader if trainer.training else trainer.val_dataloaders
        return sequence_logps(self._table_of(loader.dataset.examples), batch)

    def _table_of(self, examples: Sequence[Example]) -> Tensor:
        for _, known, table in self._tables:
            if known is examples:
                return table
        digest = examples_digest(examples)  # a loader that was asked for anew may hold the same once more
        for known_digest, _, table in self._tables:
            if known_digest == digest:
                self._tables.append((digest, examples, table))
                return table
        raise ValueError(
            "reference_cache: the data is not what it was when training started (were loaders exchanged?), and the "
            "reference is not in memory any more; keep the data, or leave reference_cache out"
        )

    @contextmanager
    def _reference(self, stage: LightningModule) -> Iterator[nn.Module]:
        """The network itself: in memory already, or the policy where it is (still) the same; else it is loaded."""
        policy, network = stage.policy, stage.reference if self._loaded is None else self._loaded
        if network is None and self.reference_source is None and has_adapters(policy):
            with reference_mode(policy):
                yield policy
        elif network is None and self.reference_source is None and self._is_anchored(policy):
            with evaluating(policy):
                yield policy
        else:
            if network is None:  # a resumed policy is no reference
                network = make_reference(policy, self.policy_source, self.reference_source)
                self.check(network)
            yield stage.trainer.precision_plugin.convert_module(network).to(stage.device)

    def _is_anchored(self, policy: nn.Module) -> bool:
        return fingerprint(policy) == self._network["fingerprint"]

    def _table(
        self, split: str, loader: PlannedLoader, network: nn.Module, trainer: Trainer
    ) -> tuple[str, Sequence[Example], Tensor]:
        examples, device = loader.dataset.examples, trainer.strategy.root_device
        digest = examples_digest(examples)
        key = cache_key(
            network=self._network, examples=digest, precision=trainer.precision, machine=describe_machine(device)
        )
        root = getattr(getattr(trainer, "datamodule", None), "cache_dir", None)
        folder = cache_folder(root) if self.cache is True else Path(self.cache).expanduser()
        path = trainer.strategy.broadcast(folder / f"{key}.safetensors")
        table = trainer.strategy.broadcast(_read(path, len(examples)) if trainer.is_global_zero else None)
        if table is not None:
            table = table.to(device)
            difference = _verify(table, path, loader, network, trainer, self._tolerance(network, trainer))
            done = f"read from {path}; a sample computed again lies within {difference:.1e} nats"
        else:
            started = time.perf_counter()
            rank_zero_info(f"reference: computing log-probabilities of {len(examples)} {split} examples, once")
            table = compute(loader, network, trainer)
            written = trainer.is_global_zero and _write(path, table)
            done = f"computed in {time.perf_counter() - started:.0f} s" + (f", kept in {path}" if written else "")
        rank_zero_info(f"reference: log-probabilities of {len(examples)} {split} examples {done}")
        return digest, examples, table

    def _tolerance(self, network: nn.Module, trainer: Trainer) -> float:
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        return COARSE if "16" in str(trainer.precision) else TOLERANCES.get(dtype, COARSE)


def cached_reference(
    cache: bool | str, policy: ModelSource, reference: ModelSource | None, reference_free: bool
) -> CachedReference | None:
    """What a stage's option `reference_cache` asks for; None = the reference stays in memory.

    Raises:
        ValueError: There is nothing to keep.
    """
    if not cache:
        return None
    if reference_free:
        raise ValueError("reference_cache: this loss looks at no reference; leave reference_cache out")
    return CachedReference(cache, policy, reference)


def fixed_loaders(trainer: Trainer) -> dict[str, PlannedLoader]:
    """The loaders of training and, if there is any, of validation.

    Raises:
        ValueError: One of them does not load a fixed set of examples.
    """
    trainer.fit_loop.setup_data()  # Lightning itself does so for schedules that need the number of steps
    loaders = {"training": trainer.train_dataloader}
    if trainer.enable_validation:
        loaders["validation"] = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    loaders = {split: loader for split, loader in loaders.items() if loader is not None and loader != []}
    for split, loader in loaders.items():
        if not isinstance(loader, PlannedLoader):
            raise ValueError(
                f"reference_cache: the {split} data has no fixed set of examples ({type(loader).__name__}), so there "
                "is nothing to keep log-probabilities of; leave model.reference_cache out, or data.streaming"
            )
    return loaders


def compute(loader: PlannedLoader, network: nn.Module, trainer: Trainer) -> Tensor:
    """What a network says of all examples, each rank computing its share, in micro-batches of the loader's size.

    Returns:
        Log-probability of each branch in nats, summed over its scored tokens, [N, branches]; the same on every rank.

    Raises:
        ValueError: A number is not finite.
    """
    examples, device = loader.dataset.examples, trainer.strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    table = torch.zeros(len(examples), len(examples[0].branches), dtype=dtype, device=device)
    share = PlannedLoader(
        examples,
        loader.dataset.collate,
        lengths=loader.lengths,
        trained_weights=loader.trained_weights,
        batch_size=loader.batch_size,
        max_tokens=loader.max_tokens,
        rank=loader.rank,
        world_size=loader.world_size,
        micro_batches=loader.micro_batches,
        shuffle=False,
        num_workers=loader.num_workers,
    )
    for batch in share:
        _fill(table, network, batch.to(device))
    table = trainer.strategy.reduce(table, reduce_op="sum")  # every row stands in one share, and is 0 in the others
    if not table.isfinite().all():
        row = int((~table.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"reference: its log-probabilities of example {row} are {table[row].tolist()}")
    return table


def _fill(table: Tensor, network: nn.Module, batch: MicroBatch) -> None:
    """Writes the micro-batch's rows."""
    table[batch.indices] = sequence_sums(token_logps(network, batch), batch)[batch.groups]


def _read(path: Path, num_examples: int) -> Tensor | None:
    try:
        return read_logps(path, num_examples)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        rank_zero_warn(f"reference_cache: {path} is damaged and is computed anew: {error}")
        return None


def _write(path: Path, table: Tensor) -> bool:
    try:
        write_logps(path, table)
    except OSError as error:  # this run has its numbers
        rank_zero_warn(f"reference_cache: the next run will have to compute them again, {path} cannot be kept: {error}")
        return False
    return True


def _verify(
    table: Tensor, path: Path, loader: PlannedLoader, network: nn.Module, trainer: Trainer, tolerance: float
) -> float:
    """Computes a few examples again, the same ones on every rank; the largest difference in nats."""
    rows = np.unique(np.linspace(0, len(table) - 1, SAMPLE).round().astype(int)).tolist()
    batch = loader.dataset[MicroPlan(tuple(rows), StepTotals(1.0, len(rows)), (0,) * len(rows))].to(table.device)
    again = torch.zeros_like(table)
    _fill(again, network, batch)
    apart, scale = (table - again)[rows].abs(), torch.maximum(table, again)[rows].abs().clamp(min=1.0)
    worst = trainer.strategy.reduce((apart / scale).max(), reduce_op="max")  # so that all ranks stop, or none
    if not worst <= tolerance:
        row = rows[int((apart / scale).max(1).values.argmax())]
        raise ValueError(
            f"reference_cache: of example {row} the reference gives {again[row].tolist()} nats, and {path} holds "
            f"{table[row].tolist()}; delete this file, so that it is made anew"
        )
    return float(apart.max())
