"""Random number generators in the checkpoint: Lightning leaves them out, and dropout and sampling need them."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed


class RandomState(Callback):
    """Saves and restores the generators of torch, Python, NumPy and CUDA of every rank.

    Tensors and lists alone, so that the checkpoint loads with `weights_only=True`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved: list[dict[str, Any]] | None = None
        self._trainer: Trainer | None = None
        self._at_step: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States of all ranks; every rank has to call it."""
        return {"ranks": _of_all_ranks(self._state())}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the state at the first of a step's micro-batches."""
        self._trainer = trainer
        if trainer.accumulate_grad_batches > 1 and _micro_batches_begun(trainer) == 1:
            self._at_step = random_state()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets it."""
        self._trainer = self._at_step = None

    def _state(self) -> dict[str, Any]:
        """The present state; inside a step that of its beginning, for a resumed run makes the step anew."""
        inside = self._trainer is not None and _micro_batches_begun(self._trainer) > 0
        return self._at_step if inside and self._at_step is not None else random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts; setting up draws random numbers."""
        self._saved = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores this rank's state."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        if len(saved) != trainer.world_size:
            warnings.warn(
                f"the checkpoint has random states of {len(saved)} ranks, this run has {trainer.world_size}: "
                "what is drawn at random goes on differently",
                stacklevel=2,
            )
        if trainer.global_rank < len(saved):
            set_random_state(saved[trainer.global_rank])


def _micro_batches_begun(trainer: Trainer) -> int:
    """Micro-batches of the present optimizer step that were begun; 0 = all of them, or none."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches


def random_state() -> dict[str, Any]:
    """State of this process's generators, as tensors, numbers and lists."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states
