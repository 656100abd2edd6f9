"""What an engine is: it samples answers from the policy as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_align.models.modes import evaluating
from lit_align.rollout.sampling import Answer, Sampling


class Engine(ABC):
    """Samples n answers to each prompt from softmax(logits / temperature) over the whole vocabulary.

    Chosen by class path, like losses and estimators; a subclass writes `sample`.

    Attributes:
        uses_noise: True = an answer is a function of its own uniform numbers alone: not of the answers beside it,
            their order, `batch_size` or the rank, so a rollout can be repeated. False = it is not, and a run that is
            resumed may go on with other answers than the one that was never stopped.
    """

    uses_noise: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        prompt_ids: Sequence[Tensor],
        num_answers: int,
        stop_ids: Sequence[int],
        sampling: Sampling,
        noise: Tensor | None = None,
    ) -> list[tuple[Answer, ...]]:
        """Samples; the model is put in eval mode for the while.

        Args:
            model: Causal language model, with adapters or without.
            prompt_ids: Token ids of B prompts, int64 [P_i], P_i >= 1, on the model's device; one may stand there twice.
            num_answers: n, answers to each prompt.
            stop_ids: Tokens that end an answer.
            sampling: How.
            noise: The uniform numbers that decide the tokens, float64 [B * n, max_new_tokens], those of one prompt next
                to each other; None = drawn from torch's global generator.

        Returns:
            For each prompt its n answers, in order.
        """
        if noise is None:
            noise = torch.rand(len(prompt_ids) * num_answers, sampling.max_new_tokens, dtype=torch.float64)
        if not prompt_ids:
            return []
        with evaluating(model):
            flat = self.sample(model, list(prompt_ids), num_answers, list(stop_ids), sampling, noise)
        return [tuple(flat[i : i + num_answers]) for i in range(0, len(flat), num_answers)]

    @abstractmethod
    def sample(
        self,
        model: nn.Module,
        prompt_ids: list[Tensor],
        num_answers: int,
        stop_ids: list[int],
        sampling: Sampling,
        noise: Tensor,
    ) -> list[Answer]:
        """The B * n answers, those of one prompt next to each other; called without gradient, in eval mode."""


def as_answer(tokens: Sequence[int], logps: Sequence[float], stop_ids: Sequence[int], max_new_tokens: int) -> Answer:
    """An answer from what was generated: all after the first stop token, or beyond the limit, is left out."""
    stop = next((i for i, token in enumerate(tokens[:max_new_tokens]) if token in stop_ids), None)
    size = max_new_tokens if stop is None else stop + 1
    ids, values = torch.tensor(tokens[:size]), torch.tensor(logps[:size], dtype=torch.float32)
    return Answer(ids, stop is not None, values)
