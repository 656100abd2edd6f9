"""transformers' continuous batching as an engine: a paged cache and a scheduler, made for GPUs with flash attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from lit_align.models import base_model
from lit_align.models.attention import PACKED
from lit_align.rollout.engines.base import Engine, as_answer
from lit_align.rollout.engines.generate import plain_generation
from lit_align.rollout.sampling import Answer, Sampling

MIN_TOKENS = 1024
"""Tokens that one of its forwards may hold, at least: prompts are seen in pieces of this size."""


@dataclass(frozen=True)
class ContinuousBatching(Engine):
    """Samples with `generate_batch` on the training weights.

    It draws by itself: the uniform numbers only seed it, so a rollout can be repeated as a whole on the same machine,
    and an answer depends on all others, on `batch_size` and on the number of ranks. It needs whole weights (sharded
    ones end answers early, and only a log says so), and attention that it can page: `packed` is exchanged for `sdpa`
    meanwhile. Logits are the model's own.

    Attributes:
        page_size: Tokens of a page of the cache, at least 4; the cache holds `sampling.batch_size` answers.
    """

    uses_noise: ClassVar[bool] = False

    page_size: int = 64

    def sample(
        self,
        model: nn.Module,
        prompt_ids: list[Tensor],
        num_answers: int,
        stop_ids: list[int],
        sampling: Sampling,
        noise: Tensor,
    ) -> list[Answer]:
        """See `Engine`; of `noise` the first number is the seed.

        Raises:
            RuntimeError: transformers lost answers.
            ValueError: The model has no attention that can be paged.
        """
        network, greedy = base_model(model), sampling.temperature == 0
        drawing = {"do_sample": True, "top_k": 0, "temperature": sampling.temperature}
        drawing = {} if greedy else drawing | {"num_return_sequences": num_answers}
        config = plain_generation(network, stop_ids, sampling, **drawing)
        settings = self._settings(prompt_ids, len(noise), sampling, seed=int(float(noise[0, 0]) * 2**31))
        # It seeds the global generator.
        with _pageable(network), torch.random.fork_rng(devices=_devices(prompt_ids[0].device)):
            outputs = network.generate_batch([ids.tolist() for ids in prompt_ids], config, settings, warmup=False)
        _check(outputs, len(prompt_ids) if greedy else len(noise))
        rows = [o for o in outputs.values() for _ in range(num_answers if greedy else 1)]
        limit = sampling.max_new_tokens
        logps = [[0.0] * len(o.generated_tokens) if greedy else o.logprobs for o in rows]
        return [as_answer(o.generated_tokens, p, stop_ids, limit) for o, p in zip(rows, logps, strict=True)]

    def _settings(
        self, prompt_ids: list[Tensor], count: int, sampling: Sampling, seed: int
    ) -> ContinuousBatchingConfig:
        """By itself it would take most of the memory that is free, on a CPU too."""
        longest = max(len(ids) for ids in prompt_ids)
        pages = -(-(longest + sampling.max_new_tokens) // self.page_size) + 1
        rows = min(sampling.batch_size, count)
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=rows * pages,
            max_batch_tokens=max(rows, longest, MIN_TOKENS),
            max_requests_per_batch=rows,
            return_logprobs=True,
            seed=seed,
        )


@contextmanager
def _pageable(model: PreTrainedModel) -> Iterator[None]:
    attention = model.config._attn_implementation
    if attention == PACKED:
        try:
            model.set_attn_implementation("sdpa")
        except ValueError as error:  # transformers has no `sdpa` for architectures that cap their scores
            raise ValueError(
                f"engine ContinuousBatching pages `sdpa` attention, which {type(model).__name__} does not have. "
                "Set `engine: Decode`, which serves it"
            ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _check(outputs: dict[str, Any], count: int) -> None:
    """Transformers only writes to the log what went wrong."""
    errors = [output.error for output in outputs.values() if output.error is not None]
    if errors or len(outputs) != count:
        raise RuntimeError(
            f"engine ContinuousBatching: transformers gave {len(outputs) - len(errors)} of {count} answers"
            + (f"; the first error: {errors[0]}" if errors else "")
            + ". Set `engine: Decode`, which serves the same models"
        )
