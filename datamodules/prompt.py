"""Queries to answer: the data of PPO and its relatives, of samples and of predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.base import AlignDataModule
from datamodules.examples import Examples
from datamodules.formats import Place, parse_query
from datamodules.formats.prompts import as_record
from datamodules.overlong import Overlong, fit_prompt
from datamodules.rows import Rows
from datamodules.store import prompt_key
from datamodules.templates import ChatTemplate
from lit_align.batch import Example, MicroBatch, MicroPlan, PlannedLoader, PromptBatch, StepTotals


class PromptDataModule(AlignDataModule):
    """Prompts without answers, for PPO, RLOO and GRPO.

    Records are {"question": ...}, {"query": ...}, {"prompt": text or messages}, {"instruction": ..., "input": ...} or
    {"conversations": [...]} that end with a user or an observation, with optional "system", "history" and "tools".
    All other fields (an "answer", say) are handed to the reward functions as they are.

    `batch_size` is the number of prompts of a rollout over all ranks; `max_length` is the budget of a prompt.

    Args:
        **kwargs: See `AlignDataModule`.

    Attributes:
        collector: What turns the loader of prompts to the iterable that is trained on (a rollout, say) and has a
            cursor of its own; the stage sets it in its `setup`. None = the prompts themselves are iterated.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.max_tokens is not None:
            raise ValueError("max_tokens: prompts are counted, not measured; give batch_size = prompts of a rollout")
        self.collector: Callable[[PlannedLoader], Any] | None = None

    def encoder(self) -> PromptEncoder:
        """Makes rows from queries."""
        return PromptEncoder(ChatTemplate(self.tokenizer), self.max_length, self.overlong)

    def examples(self, rows: Rows, chosen: np.ndarray) -> PromptExamples:
        """The queries in the chosen rows."""
        return PromptExamples(rows, chosen)

    def collate(self) -> Callable[[list, MicroPlan], PromptBatch]:
        """Makes a batch of prompts; there is nothing to lay out yet."""
        return collate_prompts

    def lay_out(self, examples: Sequence[Example], indices: Sequence[int], totals: StepTotals) -> MicroBatch:
        """A micro-batch of prompts with their answers, packed or padded as configured."""
        return super().collate()(examples, MicroPlan(tuple(indices), totals))

    def micro_batches(self) -> int:
        """1: a rollout takes its prompts together, and splits the training that follows in its own way."""
        return 1

    def train_loader(self) -> Any:
        """The prompts in the order of the plan, or what the collector makes of them."""
        loader = super().train_loader()
        return loader if self.collector is None else self.collector(loader)

    def dictionaries(self, indices: list[int], split: str = "train") -> dict[str, Any]:
        """Queries as `query` (the rendered prompt) and `input_ids` (its ids, a list for each of the B queries)."""
        examples = self.datasets[split]
        return {
            "query": [examples.text("prompt", i) for i in indices],
            "input_ids": [examples[i][0].tolist() for i in indices],
        }


class PromptExamples(Examples):
    """Pairs of prompt ids, int64 [P], and the record they come from."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        super().__init__(rows, chosen)
        self.lengths = rows.ragged("prompt_ids").lengths[chosen]
        self.trained_weights = np.zeros(len(chosen))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Prompt ids and record."""
        row = int(self.chosen[index])
        ids = torch.from_numpy(self.rows.ragged("prompt_ids")[row].astype(np.int64))
        return ids, json.loads(self.rows.text("record", row))


def collate_prompts(examples: list[tuple[Tensor, dict]], plan: MicroPlan) -> PromptBatch:
    """A batch of the plan's prompts."""
    return PromptBatch(
        prompt_ids=tuple(ids for ids, _ in examples),
        records=tuple(record for _, record in examples),
        indices=torch.tensor(plan.indices, dtype=torch.long),
        repeats=plan.repeats,
    )


@dataclass(frozen=True)
class PromptEncoder:
    """Record -> ids of the rendered prompt."""

    template: ChatTemplate
    max_length: int
    overlong: Overlong
    pieces = False
    columns = {  # noqa: RUF012 (a constant)
        "prompt_ids": "int32[]",
        "prompt": "string",
        "record": "string",
        "key": "int64",
        "origin": "string",
    }

    def settings(self) -> dict[str, Any]:
        """What the rows depend on."""
        return {"max_length": self.max_length, "overlong": self.overlong}

    def __call__(self, record: Any, place: Place, continues: bool) -> tuple[dict[str, Any], list[str]]:
        """The row of a query and what was cut of it."""
        query = parse_query(record, place)
        text, ids = self.template.prompt(query.messages, query.tools, place)
        ids, cuts = fit_prompt(ids, self.max_length, self.overlong, place)
        return {
            "prompt_ids": ids,
            "prompt": text,
            "record": json.dumps(as_record(record, place)),
            "key": prompt_key([[message.role, message.content] for message in query.messages]),
            "origin": place.origin,
        }, cuts
