"""Checkpoints that are written whole or not at all, and read without executing anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lit_align.models.unpickling import nothing_executed
from lit_align.runs import PART


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, and moves the file there once it is on the disk.

    Lightning's own way collects the file in memory and in the system's temporary folder, from where it may have to
    be copied: a kill during the copy leaves half a checkpoint under the final name.

    Nothing pickled is executed: Lightning by itself leaves that to torch's default for files, which an environment
    variable changes, and executes what it fetches from http addresses.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a local file atomically; other places go Lightning's way."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PART)
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Reads tensors and plain values alone, unless `weights_only=False` was asked for by name.

        Raises:
            ValueError: The file holds something else.
        """
        with nothing_executed(path):
            return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power failure, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
