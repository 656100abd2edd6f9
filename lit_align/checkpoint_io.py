"""Checkpoints that are written whole or not at all, and read without executing anything."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lit_align.models.unpickling import nothing_executed
from lit_align.runs import PART
from lit_align.sharded_checkpoint import META, read_whole

GONE = f".gone{PART}"
"""Ending of a folder that is being removed."""


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
        if path.is_dir():  # a sharded run wrote one of this name
            remove_folder(path)
        _write(checkpoint, part)
        os.replace(part, path)
        _sync_folder(path.parent)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Reads a file, or a folder that a sharded run wrote, as if it were one.

        Tensors and plain values alone are read, unless `weights_only=False` was asked for by name.

        Raises:
            ValueError: The file holds something else.
        """
        if _is_local_file_protocol(path) and Path(path).is_dir():
            with nothing_executed(Path(path) / META):
                return read_whole(Path(path))
        with nothing_executed(path):
            safe = True if weights_only is None else weights_only
            return super().load_checkpoint(path, map_location or _to_cpu, safe)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file or a folder; a folder loses its name first, so that half of one is never taken for whole."""
        if _is_local_file_protocol(path) and Path(path).is_dir() and not Path(path).is_symlink():
            remove_folder(Path(path))
        else:
            super().remove_checkpoint(path)


def _to_cpu(storage: Any, location: str) -> Any:
    return storage


def remove_folder(path: Path) -> None:
    """Removes a checkpoint that is a folder, and what a kill left of others that were being removed."""
    for left in path.parent.glob(f"*{GONE}"):
        shutil.rmtree(left, ignore_errors=True)
    gone = path.with_name(f"{path.name}{GONE}")
    path.rename(gone)
    shutil.rmtree(gone)


class WholeFolder:
    """A checkpoint that is a folder, written beside its name and moved there when it is on the disk.

    Args:
        path: Its name; what is there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + PART)

    def begin(self) -> None:
        """Makes the empty folder `part` to write into; one rank calls it, before all others write."""
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)

    def finish(self, meta: dict[str, Any]) -> None:
        """Adds `meta.pt` and moves the folder to its name; one rank calls it, after all have written."""
        _write(meta, self.part / META)
        _sync_folder(self.part)
        # Folders cannot be exchanged in one go: the older one keeps the name of a checkpoint until the new one has it.
        older = self.path.with_name(f"{self.path.stem}-older{self.path.suffix}")
        if older.exists():
            remove_folder(older)
        if self.path.is_file():
            self.path.unlink()
        elif self.path.exists():
            self.path.rename(older)
        self.part.rename(self.path)
        _sync_folder(self.path.parent)
        if older.exists():
            remove_folder(older)


def _write(content: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power failure, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
