"""The table of what a reference says of the examples of a split: made by all ranks together, or read and checked."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_align.batch import MicroBatch, MicroPlan, PlannedLoader, StepTotals
from lit_align.models import sequence_sums, token_logps
from lit_align.models.reference_cache import DamagedError, read_logps, write_logps

SAMPLE = 4
"""Examples of which a table that was read is computed again."""

FINE = 1e-5
"""How far numbers may lie apart, relative to the larger of them and 1 nat."""

COARSE = 2e-2
"""The same where weights or precision have 16 bits or fewer: there the shape of a micro-batch alone changes as much."""


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


def obtain(path: Path, split: str, loader: PlannedLoader, network: nn.Module, trainer: Trainer) -> Tensor:
    """The table of a split: read and checked on a sample, or computed and written; every rank has to call it.

    Args:
        path: Where the table lies, or will; rank 0's counts.
        split: What the examples are called in messages.
        loader: Of the examples, on this rank.
        network: The reference, in evaluation mode.
        trainer: On whose device the table will be.

    Returns:
        Log-probability of each branch in nats, float64 (float32 on MPS) [N, branches]; the same on every rank.

    Raises:
        ValueError: What was read is not what the reference says.
    """
    count, device = len(loader.dataset.examples), trainer.strategy.root_device
    path = trainer.strategy.broadcast(path)
    table = trainer.strategy.broadcast(_read(path, count) if trainer.is_global_zero else None)
    if table is not None:
        table = table.to(device)
        apart = _verify(table, path, loader, network, trainer)
        done = f"read from {path}; a sample that was computed again lies within {apart:.1e} nats"
    else:
        started = time.perf_counter()
        rank_zero_info(f"reference: computing log-probabilities of {count} {split} examples, once")
        table = compute(loader, network, trainer)
        written = trainer.is_global_zero and _write(path, table)
        done = f"computed in {time.perf_counter() - started:.0f} s" + (f", kept in {path}" if written else "")
    rank_zero_info(f"reference: log-probabilities of {count} {split} examples {done}")
    return table


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


def _verify(table: Tensor, path: Path, loader: PlannedLoader, network: nn.Module, trainer: Trainer) -> float:
    """Computes a few examples again, the same ones on every rank; the largest difference in nats."""
    rows = np.unique(np.linspace(0, len(table) - 1, SAMPLE).round().astype(int)).tolist()
    batch = loader.dataset[MicroPlan(tuple(rows), StepTotals(1.0, len(rows)), (0,) * len(rows))].to(table.device)
    again = torch.zeros_like(table)
    _fill(again, network, batch)
    apart, relative = (table - again)[rows].abs(), relative_difference(table[rows], again[rows])
    worst = trainer.strategy.reduce(relative.max(), reduce_op="max")  # so that all ranks stop, or none
    if not worst <= _tolerance(network, trainer):
        row = rows[int(relative.max(1).values.argmax())]
        raise ValueError(
            f"reference_cache: of example {row} the reference gives {again[row].tolist()} nats, and {path} holds "
            f"{table[row].tolist()}; delete this file, so that it is made anew"
        )
    return float(apart.max())


def relative_difference(one: Tensor, other: Tensor) -> Tensor:
    """How far numbers lie apart, each pair relative to the larger magnitude of the two and 1 nat."""
    return (one - other).abs() / torch.maximum(one.abs(), other.abs()).clamp(min=1.0)


def _tolerance(network: nn.Module, trainer: Trainer) -> float:
    wide = str(trainer.precision).startswith(("32", "64"))
    return FINE if wide and next(network.parameters()).dtype in (torch.float32, torch.float64) else COARSE
