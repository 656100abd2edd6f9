"""Rewards from Python callables: what a user's own judgement of an answer plugs into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.batch import MicroBatch
from lit_align.rollout.sampling import Answer
from lit_align.rollout.scoring import answer_rewards

RewardCallable = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


@dataclass(frozen=True)
class RewardFunction:
    """A callable that scores answers, and its weight in the reward.

    Attributes:
        function: Import path of `f(prompts, answers, records) -> scores`: three lists of equal length (rendered
            prompt, answer without special tokens, the record that the prompt came from), one number for each.
        weight: Multiplies its scores.
    """

    function: RewardCallable
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Under which its mean is logged."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, prompts: list[str], answers: list[str], records: list[dict[str, Any]]) -> list[float]:
        """Scores times weight.

        Raises:
            ValueError: The callable gave another number of scores than answers, or one that, weighted, is no finite
                number in float32, in which rewards are added up.
        """
        scores = [float(score) for score in self.function(prompts, answers, records)]
        if len(scores) != len(answers):
            raise ValueError(f"reward function {self.name}: expected {len(answers)} scores, got {len(scores)}")
        largest = torch.finfo(torch.float32).max / max(abs(self.weight), 1.0)
        for answer, score in zip(answers, scores, strict=True):
            if not abs(score) <= largest:  # written so that NaN fails
                weight = "" if self.weight == 1.0 else f" (weight {self.weight:g})"
                expected = "expected a finite number within float32"
                raise ValueError(f"reward function {self.name}: {expected}, got {score}{weight} for {answer!r}")
        return [self.weight * score for score in scores]


def function_scores(
    functions: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Tensor],
    answers: Sequence[Answer],
    records: list[dict[str, Any]],
) -> Tensor:
    """Sum of the functions' weighted scores, float32 [S]; prompts, answers and records are S each."""
    scores = torch.zeros(len(answers))
    if functions and answers:
        prompts = [tokenizer.decode(ids) for ids in prompt_ids]
        texts = [tokenizer.decode(answer.input_ids, skip_special_tokens=True) for answer in answers]
        for function in functions:
            scores += torch.tensor(function(prompts, texts, records))
    return scores


def answer_scores(
    reward_model: nn.Module | None,
    functions: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Tensor],
    answers: Sequence[Sequence[Answer]],
    records: Sequence[dict[str, Any]],
    packed: Sequence[MicroBatch],
) -> Tensor:
    """What the reward model and the functions say of each answer, added up.

    Args:
        reward_model: Frozen; None = functions alone.
        functions: May be none.
        tokenizer: The policy's.
        prompt_ids: B prompts.
        answers: n answers to each.
        records: Where the prompts come from, B.
        packed: The same prompts and answers as micro-batches.

    Returns:
        float32 [B * n], those of one prompt next to each other, on the CPU.
    """
    flat = [answer for group in answers for answer in group]
    asked = [ids for ids, group in zip(prompt_ids, answers, strict=True) for _ in group]
    repeated = [record for record, group in zip(records, answers, strict=True) for _ in group]
    scores = function_scores(functions, tokenizer, asked, flat, repeated)
    return scores if reward_model is None else scores + answer_rewards(reward_model, packed)
