"""Which run and which checkpoint a `fit` goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_align import runs

BY_LIGHTNING = ("last", "best", "hpc", "registry")
"""Values of `ckpt_path` that are no path of a file; the last one may go on after a colon."""


class FinishedError(Exception):
    """The run has done all that was asked for; its text is for the user, and nothing is wrong."""


def check_checkpoint(path: str | None) -> None:
    """Refuses a checkpoint that is not there, or not whole, before anything is built.

    Raises:
        ValueError: Says what is there instead.
    """
    if path is None or path in BY_LIGHTNING or path.startswith("registry:") or "://" in path:
        return
    if not Path(path).exists():
        raise ValueError(f"ckpt_path: there is no {path}; expected a .ckpt file, or last")
    if not runs.is_whole(Path(path)):
        raise ValueError(f"ckpt_path: {path} is no checkpoint, or was cut; --ckpt_path last takes the newest whole one")


def check_new(run_dir: str | Path) -> None:
    """Refuses to mix a new run with one that the folder holds.

    Raises:
        ValueError: The folder holds a checkpoint.
    """
    if (found := runs.newest_checkpoint(Path(run_dir))) is not None:
        raise ValueError(
            f"run_dir: {run_dir} holds a run ({found.name}); go on with it (--resume true), or give another folder"
        )


def find(run_dir: str | Path | None, root: str, stage: str, trainer: Any) -> tuple[str, str] | None:
    """The run to go on with and its newest whole checkpoint; None = a new run begins.

    Args:
        run_dir: The folder that the user or the job's id named; None = the stage's newest run, if it has not finished.
        root: Where runs are.
        stage: Short name of the stage.
        trainer: The trainer's settings.

    Raises:
        FinishedError: The named run has done all of its steps.
    """
    folder = Path(run_dir) if run_dir is not None else runs.newest_run(root, stage)
    found = runs.newest_checkpoint(folder) if folder is not None else None
    if folder is None or found is None:
        return None
    if (done := _results(folder)) is not None:
        if run_dir is None:
            print(f"{folder} has finished: a new run begins")
            return None
        steps, epochs = done
        if _reached(trainer.get("max_steps"), steps) or _reached(trainer.get("max_epochs"), epochs):
            raise FinishedError(f"{folder} has finished ({steps} optimizer steps): there is nothing to do")
    return str(folder), str(found)


def _results(folder: Path) -> tuple[int, int] | None:
    """Steps and epochs of a run that has finished; None if it has not, or left half a file (a full disk, a kill)."""
    try:
        done = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return int(done["steps"]), int(done["epochs"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _reached(limit: int | None, done: int) -> bool:
    return limit is not None and 0 <= limit <= done
