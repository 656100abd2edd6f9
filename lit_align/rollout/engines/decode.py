"""The decode loop: on the live training weights, each prompt seen once, work only for rows that are alive."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lit_align.models import base_model
from lit_align.models.logits import head_logits
from lit_align.models.packable import other_layers
from lit_align.rollout.draw import draw, precise
from lit_align.rollout.engines.base import Engine, as_answer
from lit_align.rollout.engines.graphs import Capture, GraphedStep, Step, captured
from lit_align.rollout.engines.slots import Prefilled, Slots
from lit_align.rollout.sampling import Answer, Sampling, left_padded

SLACK = 128
"""Spare columns of the cache where rows are refilled: so often its tokens are moved back to the front."""


@dataclass(frozen=True)
class Decode(Engine):
    """Samples with a loop of its own in the memory of the training weights; nothing is copied or synchronised.

    A prompt is seen once for all its answers. Keys and values lie in a cache that is allocated once a rollout, of
    `sampling.batch_size` rows. An answer that is done leaves its row to the next one that waits, or, where none waits,
    the batch becomes smaller. Logits are those of training (`head_logits`, float32).

    Attributes:
        refill_at: Share of the rows that have to be free before waiting answers take them: each time some prompts
            are seen, which is quicker for many than for few.
        read_every: Steps between two looks at what was sampled, on a GPU; in between, rows that are done go on in
            vain, and the host does not wait. On a CPU it is every step.
        cuda_graphs: On a GPU, whether the step is captured as a CUDA graph for each number of rows that comes up.
    """

    refill_at: float = 0.25
    read_every: int = 16
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.refill_at <= 1 or self.read_every < 1:
            raise ValueError(
                f"Decode: expected 0 < refill_at <= 1 and read_every >= 1, got {self.refill_at} and {self.read_every}"
            )

    def sample(
        self,
        model: nn.Module,
        prompt_ids: list[Tensor],
        num_answers: int,
        stop_ids: list[int],
        sampling: Sampling,
        noise: Tensor,
    ) -> list[Answer]:
        """See `Engine`.

        Raises:
            ValueError: The model keeps something else than keys and values of each token.
        """
        network = base_model(model)
        others = other_layers(network.config)  # not all models with convolutions or recurrences say they have a state
        if network._is_stateful or others:
            named = f" in layers of type {', '.join(sorted(others))}" if others else ""
            raise ValueError(
                f"engine Decode keeps keys and values, and {type(network).__name__} carries a state along{named}; "
                "set `engine: Generate`"
            )
        on_gpu = prompt_ids[0].device.type == "cuda"
        decoding = Decoding(
            self,
            model,
            prompt_ids,
            num_answers,
            stop_ids,
            sampling,
            noise,
            captured if on_gpu and self.cuda_graphs else None,
        )
        return decoding.run()


class Decoding:
    """One rollout of `Decode`.

    Args:
        settings: The engine.
        model: See `Engine`, like the next five.
        prompt_ids: B prompts.
        num_answers: n.
        stop_ids: What ends an answer.
        sampling: How.
        noise: float64 [B * n, max_new_tokens].
        capture: Makes a replay of a step; None = steps run as they are.

    Attributes:
        steps: Decode steps that were made.
        row_steps: Rows that they were made for, added up; at least the sampled tokens less the first of each answer.
        prefilled_tokens: Tokens of prompts that were seen.
    """

    def __init__(
        self,
        settings: Decode,
        model: nn.Module,
        prompt_ids: list[Tensor],
        num_answers: int,
        stop_ids: list[int],
        sampling: Sampling,
        noise: Tensor,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.trunk = base_model(model), base_model(model).base_model
        self.prompt_ids, self.n, self.sampling, self.capture = prompt_ids, num_answers, sampling, capture
        device = prompt_ids[0].device
        self.noise = noise.to(device, precise(device))
        self.stop_ids = set(stop_ids)
        # Prompts of like length are padded together; the longest ones go first, and the last rows are short.
        order = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), i))
        self.queue = deque(prompt * num_answers + k for prompt in order for k in range(num_answers))
        self.most = min(sampling.batch_size, len(self.queue))
        self.refill_at = max(1, round(settings.refill_at * self.most))
        self.read_every = 1 if device.type == "cpu" else settings.read_every
        self.tokens: list[list[int]] = [[] for _ in noise]
        self.logps: list[list[float]] = [[] for _ in noise]
        self.rows: list[int] = []  # the answer that each live row holds
        self.slots: Slots | None = None
        self.left: Prefilled | None = None  # the prompt of which only some answers were begun
        self.step: Step | None = None
        self.steps = self.row_steps = self.prefilled_tokens = 0

    def run(self) -> list[Answer]:
        """All answers, those of one prompt next to each other; called once."""
        try:
            while self.queue or self.rows:
                if self.queue and (not self.rows or self.most - len(self.rows) >= self.refill_at):
                    self._refill()
                if self.rows:
                    self._decode()
        finally:  # the step and this object hold each other, and the cache would lie there until Python collects cycles
            self.step = self.slots = self.left = None
        limit = self.sampling.max_new_tokens
        return [as_answer(t, p, self.stop_ids, limit) for t, p in zip(self.tokens, self.logps, strict=True)]

    def _refill(self) -> None:
        answers = [self.queue.popleft() for _ in range(min(self.most - len(self.rows), len(self.queue)))]
        known = [] if self.left is None else self.left.numbers
        old = [a for a in answers if a // self.n in known]
        new = answers[len(old) :]
        if old:
            self._begin(self.left, old)
        if new:
            prompts = self._prefill(list(dict.fromkeys(a // self.n for a in new)))
            self._begin(prompts, new)
            self.left = prompts.last() if self.queue and self.queue[0] // self.n == prompts.numbers[-1] else None

    def _prefill(self, numbers: list[int]) -> Prefilled:
        """Lets the model see prompts."""
        ids, mask = left_padded([self.prompt_ids[i] for i in numbers])
        cache, positions = DynamicCache(), (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._hidden(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        sizes = [len(self.prompt_ids[i]) for i in numbers]
        self.prefilled_tokens += sum(sizes)
        return Prefilled(cache, sizes, head_logits(self.model, hidden), numbers)

    def _hidden(self, **inputs: Tensor | DynamicCache) -> Tensor:
        return self.trunk(**inputs, use_cache=True).last_hidden_state[:, -1]

    def _begin(self, prompts: Prefilled, answers: list[int]) -> None:
        """Draws the first token of each answer; those that go on take rows."""
        which = [prompts.numbers.index(a // self.n) for a in answers]
        noise = self.noise[torch.tensor(answers, device=self.noise.device)]
        logits = prompts.logits[torch.tensor(which, device=noise.device)]
        token, logps = draw(logits, self.sampling.temperature, noise[:, 0])
        self._take_down(answers, token[:, None], logps[:, None])
        alive = [i for i, answer in enumerate(answers) if not self._done(answer)]
        if not alive:
            return
        if self.slots is None:
            self.slots = self._new_slots(prompts, noise.shape[1])
        chosen = torch.tensor(alive, device=noise.device)
        self.slots.admit(prompts, [which[i] for i in alive], token[chosen], noise[chosen])
        self.rows += [answers[i] for i in alive]

    def _new_slots(self, prompts: Prefilled, noise_size: int) -> Slots:
        longest = max(len(ids) for ids in self.prompt_ids) + self.sampling.max_new_tokens
        columns = longest + self.read_every + (SLACK if self.queue else 0)
        slots = Slots(prompts, self.most, columns, noise_size, self.noise.dtype)
        self.step = self._step if self.capture is None else GraphedStep(self._step, slots, self.capture)
        return slots

    def _step(self) -> tuple[Tensor, Tensor]:
        hidden = self._hidden(**self.slots.inputs())
        token, logps = draw(head_logits(self.model, hidden), self.sampling.temperature, self.slots.uniform())
        self.slots.put(token)
        return token, logps

    def _decode(self) -> None:
        """Some steps, and then a look at what they gave: rows that are done are taken out."""
        left = self.sampling.max_new_tokens - min(len(self.tokens[answer]) for answer in self.rows)
        drawn = []
        for _ in range(min(self.read_every, left)):
            self.slots.advance()
            token, logps = self.step()
            drawn.append((token[: len(self.rows)], logps[: len(self.rows)]))
            self.steps, self.row_steps = self.steps + 1, self.row_steps + self.slots.window.rows
        self._take_down(self.rows, *(torch.stack(column, 1) for column in zip(*drawn, strict=True)))
        if done := [row for row, answer in enumerate(self.rows) if self._done(answer)]:
            self.rows = [self.rows[row] for row in self.slots.drop(done)]

    def _take_down(self, answers: list[int], token: Tensor, logps: Tensor) -> None:
        """Writes down what was drawn, [len(answers), steps]."""
        for answer, ids, values in zip(answers, token.tolist(), logps.tolist(), strict=True):
            self.tokens[answer] += ids
            self.logps[answer] += values

    def _done(self, answer: int) -> bool:
        tokens = self.tokens[answer]
        recent = tokens[-self.read_every :]
        return len(tokens) >= self.sampling.max_new_tokens or not self.stop_ids.isdisjoint(recent)
