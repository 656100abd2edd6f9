"""Sampling answers from the live training weights, under exactly the distribution that training scores.

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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from lit_align.models.modes import evaluating


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: Longest answer, its end-of-turn token included.
        temperature: Divides the logits, in sampling and in training alike; 0 = the most probable token (not for PPO).
        batch_size: Answers that are generated side by side.
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
    """

    input_ids: Tensor
    finished: bool


def answer_noise(keys: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """Uniform numbers for the tokens of each answer, a function of the answer's key alone.

    Args:
        keys: What tells each answer from all others (seed, rollout, prompt, number of the answer): B of them.
        num_tokens: Tokens of the longest answer.

    Returns:
        float64 [B, num_tokens], in [0, 1), on the CPU.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(list(key)).random(num_tokens) for key in keys]))


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Sequence[Tensor],
    stop_ids: Sequence[int],
    sampling: Sampling,
    noise: Tensor | None = None,
) -> list[Answer]:
    """Samples one answer for each prompt; the same prompt may stand there several times.

    The model is put in eval mode for the while.

    Args:
        model: Causal language model.
        prompt_ids: Token ids of the prompts, int64 [P_i], P_i >= 1, on the model's device.
        stop_ids: Tokens that end an answer.
        sampling: How.
        noise: The uniform numbers that decide the tokens, float64 [B, max_new_tokens]; None = drawn from torch's
            global generator.

    Returns:
        One answer per prompt, in order.
    """
    if noise is None:
        noise = torch.rand(len(prompt_ids), sampling.max_new_tokens, dtype=torch.float64)
    chunks = [slice(i, i + sampling.batch_size) for i in range(0, len(prompt_ids), sampling.batch_size)]
    with evaluating(model):
        return [a for c in chunks for a in _sample_chunk(model, prompt_ids[c], stop_ids, sampling, noise[c])]


def _sample_chunk(
    model: nn.Module, prompt_ids: Sequence[Tensor], stop_ids: Sequence[int], sampling: Sampling, noise: Tensor
) -> list[Answer]:
    ids, mask = left_padded(prompt_ids)
    noise = noise.to(ids.device, _precise(ids.device))
    stops = torch.as_tensor(list(stop_ids), device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    lengths = torch.full((len(ids),), sampling.max_new_tokens, device=ids.device)
    sampled: list[Tensor] = []
    cache, positions = DynamicCache(), (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = _draw(output.logits[:, -1].float(), sampling.temperature, noise[:, step])
        sampled.append(token)
        newly_done = torch.isin(token, stops) & ~done
        lengths[newly_done] = step + 1
        done |= newly_done
        if bool(done.all()):
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    tokens = torch.stack(sampled, dim=1).cpu()
    ends, finished = lengths.tolist(), done.tolist()
    return [Answer(row[:end], flag) for row, end, flag in zip(tokens, ends, finished, strict=True)]


def left_padded(prompt_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts as one rectangle: ids [B, P] and mask [B, P] (1 = real token), padded on the left with id 0."""
    ids = pad_sequence(list(prompt_ids), batch_first=True, padding_side="left")
    ones = [torch.ones_like(prompt) for prompt in prompt_ids]
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1, dtype=uniform.dtype)
    # To the right: a token of probability 0 has no room between its bounds, so it is never drawn.
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
