"""A trainer around hand-made examples: the stages without data modules or command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer

from lit_align.batch import Branch, Example, PlannedLoader, PromptBatch, pack, pad

BYTES = 256
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Settings of a trainer that writes and prints nothing."""


class ExampleData(LightningDataModule):
    """Serves examples in either layout, or prompts; splits each step over `accumulate_grad_batches`."""

    def __init__(
        self,
        examples: list,
        batch_size: int | None = 8,
        layout: str = "packed",
        side: str = "right",
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.examples, self.batch_size, self.layout, self.side = examples, batch_size, layout, side
        self.collector: Callable | None = None
        self.loader = None
        self.state: dict | None = None

    def _collate(self, examples, plan):
        if isinstance(self.examples[0], torch.Tensor):
            records = tuple({"prompt": prompt.tolist()} for prompt in examples)
            return PromptBatch(tuple(examples), records, torch.tensor(plan.indices, dtype=torch.long))
        if self.layout == "packed":
            return pack(examples, plan.indices, plan.totals)
        return pad(examples, plan.indices, plan.totals, padding_side=self.side)

    def _loader(self, shuffle: bool) -> PlannedLoader:
        weights = [getattr(example, "trained_weight", 0.0) for example in self.examples]
        return PlannedLoader(
            self.examples,
            self._collate,
            lengths=np.array([len(example) for example in self.examples]),
            trained_weights=np.array(weights),
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            micro_batches=self.trainer.accumulate_grad_batches if shuffle and not self.collector else 1,
            shuffle=shuffle,
        )

    def train_dataloader(self):
        loader = self._loader(shuffle=True)
        self.loader = self.collector(loader) if self.collector else loader
        if self.state:
            self.loader.load_state_dict(self.state)
        return self.loader

    def val_dataloader(self):
        return self._loader(shuffle=False)

    def predict_dataloader(self):
        return self._loader(shuffle=False)

    def state_dict(self):
        return self.loader.state_dict() if self.loader else {}

    def load_state_dict(self, state):
        self.state = state
        if self.loader:
            self.loader.load_state_dict(state)


@pytest.fixture
def make_data():
    return ExampleData


@pytest.fixture
def make_trainer(tmp_path: Path):
    """A quiet CPU trainer; keyword arguments go to `Trainer`."""

    def make(**options) -> Trainer:
        settings = {
            **QUIET,
            "devices": 1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
            "gradient_clip_val": 1.0,
        }
        return Trainer(**settings | options)

    return make


def _ids(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, BYTES, (size,), generator=generator)


def _size(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


@pytest.fixture
def conversations() -> list[Example]:
    """20 of ragged length, about half of their tokens trained."""
    g = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(20):
        size = _size(3, 30, g)
        weights = (torch.rand(size, generator=g) < 0.5).float()
        weights[-1] = 1.0
        examples.append(Example(_ids(0, g), (Branch(_ids(size, g), weights),)))
    return examples


@pytest.fixture
def pairs() -> list[Example]:
    """20 of ragged length."""
    g = torch.Generator().manual_seed(2)

    def branch() -> Branch:
        ids = _ids(_size(1, 20, g), g)
        return Branch(ids, torch.ones(len(ids)))

    return [Example(_ids(_size(1, 15, g), g), (branch(), branch())) for _ in range(20)]


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    """16 of ragged length."""
    g = torch.Generator().manual_seed(3)
    return [_ids(_size(1, 10, g), g) for _ in range(16)]
