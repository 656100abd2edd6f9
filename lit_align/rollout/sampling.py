"""How answers are sampled, under exactly the distribution that training scores; `engines` do it.

softmax(logits / temperature) over the whole vocabulary: no top-k, no top-p, no penalties. Whatever else shapes
the sampling distribution makes KL estimates and ratios wrong, so it is not offered.

Tokens are drawn by inverting the distribution function at given uniform numbers. So an answer depends on its own
numbers alone: not on what is sampled beside it, in which order, or on which process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: Longest answer, its end-of-turn token included.
        temperature: Divides the logits, in sampling and in training alike; 0 = the most probable token (not for PPO).
        batch_size: Most answers that are generated side by side.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.temperature < 0:
            raise ValueError(
                "sampling: expected max_new_tokens >= 1, batch_size >= 1, temperature >= 0, got "
                f"{self.max_new_tokens}, {self.batch_size}, {self.temperature}"
            )


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        input_ids: Token ids, int64 [R], R >= 1, on the CPU; the stop token is the last one if it was sampled.
        finished: Whether the stop token was sampled before `max_new_tokens` ran out.
        logps: Log-probability of each token under softmax(logits / temperature), in nats, as the engine computed it,
            float32 [R], on the CPU; 0 where the temperature is 0.
    """

    input_ids: Tensor
    finished: bool
    logps: Tensor


def answer_noise(keys: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """Uniform numbers for the tokens of each answer, a function of the answer's key alone.

    Args:
        keys: What tells each answer from all others (seed, rollout, prompt, number of the answer): B of them.
        num_tokens: Tokens of the longest answer.

    Returns:
        float64 [B, num_tokens], in [0, 1), on the CPU.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(list(key)).random(num_tokens) for key in keys]))


def left_padded(prompt_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts as one rectangle: ids [B, P] and mask [B, P] (1 = real token), padded on the left with id 0."""
    ids = pad_sequence(list(prompt_ids), batch_first=True, padding_side="left")
    ones = [torch.ones_like(prompt) for prompt in prompt_ids]
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")
