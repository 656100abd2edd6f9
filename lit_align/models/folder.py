"""Folders of finished models: they appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKS = ("config.json", "adapter_config.json")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out`, which takes the place of `out` when nothing went wrong.

    Raises:
        ValueError: When something lies at `out` that is neither a model nor an empty folder.
    """
    if out.exists() and not _may_go(out):
        raise ValueError(f"{out} exists and is no model folder; choose another place or remove it")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _may_go(out: Path) -> bool:
    return out.is_dir() and (not any(out.iterdir()) or any((out / mark).is_file() for mark in MARKS))
