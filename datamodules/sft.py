"""Conversations whose assistant is imitated: the data of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from datamodules.base import AlignDataModule
from datamodules.dictionaries import language_dictionary
from datamodules.examples import Examples
from datamodules.formats import Conversation, Place, parse_conversation
from datamodules.overlong import Overlong, fit_turns
from datamodules.rows import Rows
from datamodules.store import prompt_key
from datamodules.templates import ChatTemplate
from lit_align.batch import Branch, Example

TrainOn = Literal["all", "last"]


class SFTDataModule(AlignDataModule):
    """Conversations for supervised fine-tuning; the assistant's turns are trained, all else is seen alone.

    Records are {"conversations": [{"from", "value"}, ...]} or {"messages": [{"role", "content"}, ...]}, with optional
    "system", "tools" and "weight"; a message may have a "weight" of its own. Roles: human or user; gpt, assistant,
    model or bot; system; function_call; observation, tool or function. A prompt in one field ("prompt", "question",
    "query", "instruction" with "input") beside its answer ("completion", "output", "response", "answer") is fine too.

    Args:
        train_on: Train "all" assistant turns of a conversation, or the "last" alone.
        **kwargs: See `AlignDataModule`.
    """

    def __init__(self, train_on: TrainOn = "all", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if train_on not in ("all", "last"):
            raise ValueError(f"train_on: expected 'all' or 'last', got {train_on!r}")
        self.train_on = train_on

    def encoder(self) -> ConversationEncoder:
        """Makes rows from conversations."""
        template = ChatTemplate(self.tokenizer)
        template.check_prefix_preserving()
        return ConversationEncoder(template, self.train_on, self.max_length, self.overlong)

    def warnings(self) -> list[str]:
        """What a user should know about the data and the template."""
        return super().warnings() + ChatTemplate(self.tokenizer).warnings()

    def examples(self, rows: Rows, chosen: np.ndarray) -> ConversationExamples:
        """The conversations in the chosen rows."""
        return ConversationExamples(rows, chosen)

    def dictionaries(self, indices: list[int], split: str = "train", pad_to: int | None = None) -> dict[str, Any]:
        """Examples as a padded rectangle: input_ids, attention_mask, labels (-100 = not trained).

        Args:
            indices: Which examples, B of them.
            split: Of which split.
            pad_to: Columns of the rectangle; default: as many as the longest example needs.

        Returns:
            int64 tensors [B, T].
        """
        return language_dictionary([self.datasets[split][i] for i in indices], self.collate(), pad_to)


class ConversationExamples(Examples):
    """Conversations: one branch each, no prefix."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        super().__init__(rows, chosen)
        self.lengths = rows.ragged("input_ids").lengths[chosen]
        self.trained_weights = rows.numbers("trained")[chosen]

    def __getitem__(self, index: int) -> Example:
        """The conversation as an example."""
        row = int(self.chosen[index])
        ids = torch.from_numpy(self.rows.ragged("input_ids")[row].astype(np.int64))
        weights = torch.from_numpy(self.rows.ragged("weights")[row].copy())
        return Example(prefix_ids=ids[:0], branches=(Branch(ids, weights),))


@dataclass(frozen=True)
class ConversationEncoder:
    """Record -> token ids with a weight for each token."""

    template: ChatTemplate
    train_on: TrainOn
    max_length: int
    overlong: Overlong
    pieces = False
    columns = {  # noqa: RUF012 (a constant)
        "input_ids": "int32[]",
        "weights": "float32[]",
        "trained": "float64",
        "key": "int64",
        "origin": "string",
    }

    def settings(self) -> dict[str, Any]:
        """What the rows depend on."""
        return {"train_on": self.train_on, "max_length": self.max_length, "overlong": self.overlong}

    def __call__(self, record: Any, place: Place, continues: bool) -> tuple[dict[str, Any], list[str]]:
        """The row of a conversation and what was cut of it."""
        conversation = parse_conversation(record, place)
        tokens = self.template.conversation(conversation.messages, conversation.tools, place)
        weights = self._weights(conversation)[tokens.turns]
        weights[0] = 0  # nothing stands before it that could predict it
        if not (weights > 0).any():
            mend = "Give an assistant turn a weight above 0, or delete the record"
            raise place.fault("no trained token", "an example of which no token would be trained", "at least one", mend)
        ids, weights, cuts = fit_turns(tokens.ids, weights, self.max_length, self.overlong, place)
        first_answer = next(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
        asked = [[message.role, message.content] for message in conversation.messages[:first_answer]]
        return {
            "input_ids": ids,
            "weights": weights,
            "trained": float(weights[1:].sum(dtype=np.float64)),
            "key": prompt_key(asked),
            "origin": place.origin,
        }, cuts

    def _weights(self, conversation: Conversation) -> np.ndarray:
        """Weight of each message's tokens, float32 [messages + 1]; the last is that of all tokens of no answer."""
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        weights = np.zeros(len(conversation.messages) + 1, dtype=np.float32)
        for i in answers if self.train_on == "all" else answers[-1:]:
            weights[i] = conversation.messages[i].weight * conversation.weight
        return weights
