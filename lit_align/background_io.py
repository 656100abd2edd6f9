"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_align.checkpoint_io import WholeCheckpointIO


class BackgroundCheckpointIO(WholeCheckpointIO):
    """Copies what a checkpoint holds to the CPU's memory, and writes it, whole or not at all, in a thread.

    Everything that changes files (writing, linking, removing older ones) runs in that thread, in the order in which it
    was asked for: an older checkpoint is removed once the newer one is on the disk. One checkpoint is under way at a
    time; the next waits for it. Lightning's `AsyncCheckpointIO` keeps neither order nor number, copies within the
    device's memory, and writes tied weights twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies, and comes back before the file is written.

        Raises:
            OSError: The checkpoint before could not be written.
        """
        self.wait()
        self.afterwards(super().save_checkpoint, snapshot(checkpoint), path, storage_options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file once all that was asked for before is done."""
        self.afterwards(super().remove_checkpoint, path)

    def afterwards(self, act: Callable[..., None], *arguments: Any) -> None:
        """Does something once all that was asked for before is done, and not at all if some of it failed."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
        before = list(self._under_way)
        self._under_way.append(self._thread.submit(_unless_failed, before, act, *arguments))

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            OSError: Or whatever else kept something from being written.
        """
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()

    def teardown(self) -> None:
        """Waits, and ends the thread; Lightning calls it at the end of a run, however that came."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


def _unless_failed(before: list[Future[None]], act: Callable[..., None], *arguments: Any) -> None:
    for future in before:
        future.result()
    act(*arguments)


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own, on the CPU; what shared its memory (tied weights) shares it again."""
    copies: dict[Any, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if where not in copies or not tensor.numel():
            copies[where] = tensor.detach().to("cpu", copy=True)
        return copies[where]

    return apply_to_collection(checkpoint, Tensor, copied)
