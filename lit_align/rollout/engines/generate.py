"""transformers' `generate` as an engine: slower than `Decode`, for every architecture, and the one to check it with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lit_align.models import base_model
from lit_align.rollout.draw import draw, precise
from lit_align.rollout.engines.base import Engine, as_answer
from lit_align.rollout.sampling import Answer, Sampling, left_padded


@dataclass(frozen=True)
class Generate(Engine):
    """Samples with `generate` and the same numbers as `Decode`, so that its answers are the same token for token.

    `sampling.batch_size` answers at a time are padded to one rectangle, in which each is computed until the longest one
    ends, and each answer sees its prompt anew. Logits are the model's own: with bfloat16 weights they have 8 bits.
    """

    def sample(
        self,
        model: nn.Module,
        prompt_ids: list[Tensor],
        num_answers: int,
        stop_ids: list[int],
        sampling: Sampling,
        noise: Tensor,
    ) -> list[Answer]:
        """See `Engine`."""
        asked = [ids for ids in prompt_ids for _ in range(num_answers)]
        size = sampling.batch_size
        chunks = [slice(i, i + size) for i in range(0, len(asked), size)]
        return [a for c in chunks for a in _chunk(base_model(model), asked[c], stop_ids, sampling, noise[c])]


def _chunk(model: nn.Module, prompts: list[Tensor], stop_ids: list[int], sampling: Sampling, noise: Tensor) -> list:
    ids, mask = left_padded(prompts)
    drawing = DrawnTokens(noise.to(ids.device, precise(ids.device)), sampling.temperature)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=plain_generation(model, stop_ids, sampling),
        logits_processor=LogitsProcessorList([drawing]),
    )
    tokens, logps = output[:, ids.shape[1] :].tolist(), torch.stack(drawing.logps, 1).tolist()
    pairs = zip(tokens, logps, strict=True)
    return [as_answer(t, p, stop_ids, sampling.max_new_tokens) for t, p in pairs]


class DrawnTokens(LogitsProcessor):
    """Leaves of each row's logits only the token that the row's uniform numbers decide on.

    Args:
        noise: Uniform numbers, [rows, steps].
        temperature: Of sampling.

    Attributes:
        logps: For each step, the log-probabilities of what was drawn, float32 [rows].
    """

    def __init__(self, noise: Tensor, temperature: float) -> None:
        self.noise, self.temperature = noise, temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draws; called once a step."""
        token, logps = draw(scores.float(), self.temperature, self.noise[:, len(self.logps)])
        self.logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def plain_generation(model: nn.Module, stop_ids: list[int], sampling: Sampling, **options: object) -> GenerationConfig:
    """Settings under which `generate` shapes the distribution in no way, whatever the model's own settings say.

    What is left out here `generate` would take from the model's own settings. top-k is off: where nothing is sampled it
    is not looked at, else `options` say so.
    """
    settings = {name: value for name, value in GenerationConfig._get_default_generation_params().items()
                if value is not None and name != "max_length"}  # fmt: skip
    settings |= {"max_new_tokens": sampling.max_new_tokens, "cache_implementation": "dynamic"}
    # -1 is no token: an empty list would be taken for "as the model says".
    settings |= {"eos_token_id": stop_ids or [model.config.get_text_config().vocab_size], "pad_token_id": 0}
    return GenerationConfig(**settings | options)
