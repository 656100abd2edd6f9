"""Pairs of a preferred and a rejected answer: the data of reward modelling and of DPO and its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from datamodules.base import AlignDataModule
from datamodules.dictionaries import concatenated_dictionary, dpo_dictionary, reward_dictionary
from datamodules.examples import Examples
from datamodules.formats import Message, Place, parse_preference
from datamodules.overlong import Overlong, fit_pair
from datamodules.rows import Rows
from datamodules.store import prompt_key
from datamodules.templates import ChatTemplate
from lit_align.batch import Branch, Example

Form = Literal["reward", "dpo", "concatenated"]


class PreferenceDataModule(AlignDataModule):
    """Pairs of answers to a prompt, for reward models and for DPO and its family.

    Records have a prompt and two answers: {"system", "history", "question", "response_chosen", "response_rejected"};
    {"conversations", "chosen", "rejected"}; {"prompt", "chosen", "rejected"}; or {"chosen", "rejected"} alone, as
    whole conversations. Prompts are text or messages, answers are text, one message or a list of messages. Optional
    numbers: "margin" (by how much the preferred answer should be better; for reward models) and "weight".

    `max_length` is the budget of the prompt together with the longer answer.

    Args:
        **kwargs: See `AlignDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def encoder(self) -> PairEncoder:
        """Makes rows from pairs."""
        return PairEncoder(ChatTemplate(self.tokenizer), self.max_length, self.overlong)

    def examples(self, rows: Rows, chosen: np.ndarray) -> PairExamples:
        """The pairs in the chosen rows."""
        return PairExamples(rows, chosen)

    def dictionaries(self, indices: list[int], split: str = "train", form: Form = "dpo") -> dict[str, Any]:
        """Pairs in the padded forms that trainers know.

        Args:
            indices: Which pairs, B of them.
            split: Of which split.
            form: "reward" = input_ids_chosen, attention_mask_chosen and the same for rejected; "dpo" = the texts
                prompt, chosen, rejected, and for each its ids, mask and (answers) labels; "concatenated" =
                concatenated_input_ids, _attention_mask, _labels, with the chosen in the first B rows.

        Returns:
            int64 tensors [B, T] ("concatenated": [2B, T]) and lists of B texts.
        """
        examples, collate = self.datasets[split], self.collate()
        pairs = [examples[i] for i in indices]
        if form == "reward":
            return reward_dictionary(pairs, collate)
        if form == "concatenated":
            return concatenated_dictionary(pairs, collate)
        texts = {name: [examples.text(name, i) for i in indices] for name in ("prompt", "chosen", "rejected")}
        return texts | dpo_dictionary(pairs, collate)


class PairExamples(Examples):
    """Pairs: the prompt as prefix, the branches (chosen, rejected); `margin` and `weight` if any record has them."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        super().__init__(rows, chosen)
        sizes = [rows.ragged(name).lengths[chosen] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        self.lengths = sizes[0] + sizes[1] + sizes[2]
        self.trained_weights = (sizes[1] + sizes[2]).astype(np.float64)
        self._values = {}
        for name, default in (("margin", 0.0), ("weight", 1.0)):
            numbers = rows.numbers(name)
            if not np.isnan(numbers).all():  # of all rows, so that training and held-out examples have the same keys
                self._values[name] = np.nan_to_num(numbers[chosen], nan=default)

    def __getitem__(self, index: int) -> Example:
        """The pair as an example."""
        row = int(self.chosen[index])
        prompt, chosen, rejected = (
            torch.from_numpy(self.rows.ragged(name)[row].astype(np.int64))
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        branches = tuple(Branch(ids, torch.ones(len(ids))) for ids in (chosen, rejected))
        return Example(prompt, branches, {name: float(numbers[index]) for name, numbers in self._values.items()})


@dataclass(frozen=True)
class PairEncoder:
    """Record -> ids of the prompt and of both answers, which continue the very same prompt ids."""

    template: ChatTemplate
    max_length: int
    overlong: Overlong
    pieces = False
    columns = {  # noqa: RUF012 (a constant)
        "prompt_ids": "int32[]",
        "chosen_ids": "int32[]",
        "rejected_ids": "int32[]",
        "margin": "float64",
        "weight": "float64",
        "prompt": "string",
        "chosen": "string",
        "rejected": "string",
        "key": "int64",
        "origin": "string",
    }

    def settings(self) -> dict[str, Any]:
        """What the rows depend on."""
        return {"max_length": self.max_length, "overlong": self.overlong}

    def __call__(self, record: Any, place: Place, continues: bool) -> tuple[dict[str, Any], list[str]]:
        """The row of a pair and what was cut of it."""
        pair = parse_preference(record, place)
        text, prompt = self.template.prompt(pair.messages, pair.tools, place)
        chosen, rejected = (
            self.template.response(pair.messages, answer, pair.tools, text, place)
            for answer in (pair.chosen, pair.rejected)
        )
        if np.array_equal(chosen, rejected):
            found = "answers that are equal once they are rendered"
            raise place.fault("equal answers", found, "two different answers", "Delete the record")
        prompt, (chosen, rejected), cuts = fit_pair(prompt, (chosen, rejected), self.max_length, self.overlong, place)
        return {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "margin": np.nan if pair.margin is None else pair.margin,
            "weight": np.nan if pair.weight is None else pair.weight,
            "prompt": text,
            "chosen": _text(pair.chosen),
            "rejected": _text(pair.rejected),
            "key": prompt_key([[message.role, message.content] for message in pair.messages]),
            "origin": place.origin,
        }, cuts


def _text(answer: Message) -> str:
    return "\n".join(part for part in (answer.content, answer.calls_text) if part)
