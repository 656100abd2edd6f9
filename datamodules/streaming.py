"""Training data that is never held as a whole: it is read and tokenised window by window while the model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.formats import FileSource, Source, resolve
from datamodules.mixtures import mixture_weights
from datamodules.report import SplitReport
from datamodules.store import Guard
from datamodules.stream import START, Stream, add_counts
from datamodules.tokenizer import tokenizer_fingerprint
from lit_align.batch import outlive_sigterm, sigterm_held

if TYPE_CHECKING:
    from datamodules.base import AlignDataModule

PREFETCH = 16
"""Micro-batches that the loader's process prepares ahead."""


def check_streaming(streaming: bool, stream_window: int, held_out: float | None) -> None:
    """Refuses what a stream cannot do.

    Raises:
        ValueError: Validation data is to be split off, or the window is empty.
    """
    if stream_window < 1:
        raise ValueError(f"stream_window: expected at least 1 record, got {stream_window}")
    if streaming and held_out is not None:
        raise ValueError(f"validation = {held_out:g}: nothing can be split off a stream; give data.validation = a file")


def open_stream(data: AlignDataModule) -> tuple[SplitReport, dict[str, Any]]:
    """What stands in for the tokenised rows of training data that is streamed.

    Returns:
        A report that counts while the stream is read, and what the examples depend on, as `tokenise` gives it.
    """
    if hasattr(data, "collector"):
        raise ValueError("streaming: prompts for rollouts are not streamed; leave data.streaming out")
    sources, encoder = resolve(data.sources["train"]), data.encoder()
    if mixture_weights(sources, "train") is not None:
        raise ValueError("streaming: a stream is read once from end to end; leave the weights of its sources out")
    settings = {"encoder": type(encoder).__name__, "on_error": data.on_error, **encoder.settings()}
    parts = {
        "data": [fingerprint(source) for source in sources],
        "tokenizer": tokenizer_fingerprint(data.tokenizer),
        "settings": {**settings, "stream_window": data.stream_window},
        "version": 0,
    }
    return SplitReport(note=f"streamed in windows of {data.stream_window} records, counted while they are read"), parts


def stream_loader(data: AlignDataModule) -> StreamLoader:
    """The loader of streamed training data.

    Raises:
        ValueError: The trainer has no `max_steps`: a stream has no length.
    """
    trainer = data.trainer
    if trainer is not None and trainer.max_steps < 1:
        raise ValueError("streaming: a stream has no length; give trainer.max_steps = optimizer steps of the run")
    bare = copy(data)  # without what a process of the loader has no use for
    bare.trainer, bare._train_loader, bare.datasets = None, None, {}
    stream = Stream(
        resolve(data.sources["train"]),
        Guard(data.encoder(), data.on_error),
        bare.examples,
        data.collate(),
        size={"batch_size": data.batch_size, "max_tokens": data.max_tokens},
        window=data.stream_window,
        rank=trainer.global_rank if trainer is not None else 0,
        world_size=trainer.world_size if trainer is not None else 1,
        micro_batches=data.micro_batches(),
        seed=data.seed,
    )
    steps = None if trainer is None else trainer.max_steps
    return StreamLoader(stream, steps, data.report.splits["train"], data.num_workers)


class StreamLoader:
    """This rank's micro-batches of a stream; one long epoch to the trainer.

    Args:
        stream: What is read.
        max_steps: Optimizer steps of the run, for its length; None = it has none.
        report: Counts what became of the records of the epoch under way.
        num_workers: 0 = the training process reads and tokenises; else one process beside it does.

    Attributes:
        cursor: The place after the micro-batch handed out last.
        unfinished: See `PlannedLoader`.
    """

    def __init__(self, stream: Stream, max_steps: int | None, report: SplitReport, num_workers: int) -> None:
        self.stream, self.max_steps, self.report, self.num_workers = stream, max_steps, report, num_workers
        self.cursor, self._before = dict(START), dict(START)
        self.unfinished: Callable[[], bool] = bool

    def __len__(self) -> int:
        """Micro-batches of this rank in the whole run (a known length keeps Lightning from fetching ahead)."""
        if self.max_steps is None:
            raise TypeError("a stream without max_steps has no length")
        return self.max_steps * self.stream.micro_batches

    def __iter__(self) -> Iterator[Any]:
        # A generator reads the cursor at its first step, after a checkpoint has been restored.
        workers: dict[str, Any] = {"num_workers": 1, "prefetch_factor": PREFETCH} if self.num_workers else {}
        workers |= {"generator": torch.Generator(), "worker_init_fn": outlive_sigterm}
        stream = replace(self.stream, start=dict(self.cursor))
        loader = DataLoader(stream, batch_size=None, **workers)
        with sigterm_held():
            items = iter(loader)
        try:
            yield from self._batches(items)
        finally:  # the run is over, or broken off
            if self.report.records:
                self._tell()

    def _batches(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            if item.report is not None:
                add_counts(self.report, item.report)
            if item.batch is None:
                self._tell()
                vars(self.report).update(vars(SplitReport(note=self.report.note)))  # others hold this object
            self._before, self.cursor = self.cursor, item.after or self.cursor
            if item.batch is not None:
                yield item.batch

    def _tell(self) -> None:
        rank_zero_info(f"data, train, epoch {self.cursor['epoch']} of the stream: {self.report}")

    def state_dict(self) -> dict[str, int]:
        """The cursor, the same on every rank; a step of which only some micro-batches were handed out counts as new."""
        return dict(self._before if self.unfinished() else self.cursor)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Puts the cursor back; the next pass goes on from there."""
        self.cursor = self._before = {name: int(state[name]) for name in START}


def fingerprint(source: Source) -> list[Any]:
    """What a stream depends on, without reading all of it: a file's size, start and end; a dataset's id."""
    if isinstance(source, FileSource):
        return source.fingerprint(whole=False)
    options = sorted((name, str(value)) for name, value in source.options.items())
    return [f"{source.path}[{source.split}]", source.path, source.split, options]
