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

    def state_dict(self) -> dict[str, Any]:
        """States of all ranks; every rank has to call it."""
        return {"ranks": _of_all_ranks(random_state())}

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
