"""The data contract: what crosses from data (or from a rollout) to a stage.

An example is a small tree: a prefix (the prompt) from which branches hang (the responses).

    pre-training block   no prefix, 1 branch, every token trained
    conversation (SFT)   no prefix, 1 branch, the assistant's tokens trained
    preference pair      prompt,    2 branches: chosen, rejected
    query with n answers prompt,    n branches

A branch attends to its prefix and to itself, its positions go on from the prefix, and its first token is
predicted from the prefix's last hidden state. A micro-batch is a forest of such trees; `packing` lays it out
as one packed row or as a padded rectangle, and everything after the trunk's forward is the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is seen but not trained (the field's convention; the default of `cross_entropy`)."""


@dataclass(frozen=True)
class Branch:
    """One continuation of an example's prefix.

    Attributes:
        input_ids: Token ids, int64 [R], R >= 1.
        weights: Loss weight of each token, float32 [R]; 0 = seen but not trained. A token is scored only if its
            weight is positive and something stands before it (the prefix or an earlier token of the branch).
        tokens: Further numbers per token, float32 [R] each (old log-probabilities, advantages, ...); they arrive
            in `MicroBatch.tokens` for the scored tokens only.
    """

    input_ids: Tensor
    weights: Tensor
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One unit of the step plan: it is never split over micro-batches.

    Attributes:
        prefix_ids: Token ids that all branches share, int64 [P]; P may be 0.
        branches: At least one; preference pairs hold (chosen, rejected) in this order.
        values: Numbers of the example as a whole ("margin", ...); they arrive as float32 [B] in
            `MicroBatch.values`. All examples of a dataset have the same keys.
    """

    prefix_ids: Tensor
    branches: tuple[Branch, ...]
    values: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        """Unique tokens: what a packed row with a shared prefix spends on this example."""
        return len(self.prefix_ids) + sum(len(branch.input_ids) for branch in self.branches)

    @property
    def trained_weight(self) -> float:
        """Sum of the weights of the tokens that will be scored."""
        has_prefix = len(self.prefix_ids) > 0
        return float(sum(float(b.weights[0 if has_prefix else 1 :].sum()) for b in self.branches))


@dataclass(frozen=True)
class StepTotals:
    """Denominators of one optimizer step, over all its ranks and micro-batches (known from the plan, no collective).

    Attributes:
        tokens: Sum of the weights of all scored tokens of the step.
        examples: Number of examples of the step.
    """

    tokens: float
    examples: float


@dataclass(frozen=True)
class Segment:
    """Queries `start:stop` of the packed row; they attend causally to themselves and wholly to `prefix_*`.

    Plain ints on the host, so that no layer has to read anything back from the device.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass(frozen=True)
class Scored:
    """The table of scored tokens: one row for each token whose log-probability a loss needs, N rows.

    Rows are ordered by sequence, then by position, so each sequence's rows are contiguous.

    Attributes:
        targets: The token's id, int64 [N].
        sources: Flat position (row-major over [rows, columns]) whose hidden state predicts it, int64 [N].
        sequences: The sequence that it belongs to, int64 [N], values in [0, S).
        weights: Its loss weight, float32 [N], all > 0.
    """

    targets: Tensor
    sources: Tensor
    sequences: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on. `S` sequences (branches) of `B` examples.

    Attributes:
        input_ids: int64 [rows, columns]; packed: rows = 1.
        position_ids: int64 [rows, columns]; packed: they restart for each example and go on from the prefix.
        attention_mask: int64 [rows, columns], 1 = real token, 0 = padding; None when packed.
        segments: Who attends to whom in the packed row; None when padded.
        scored: The tokens to score.
        ends: Flat position of each sequence's last token, int64 [S].
        groups: Sequence number of each example's branches, int64 [B, n]; column 0 of pairs is chosen, 1 rejected.
        totals: Denominators of the whole optimizer step.
        values: Numbers per example, float32 [B] each.
        tokens: Numbers per scored token, float32 [N] each.
        indices: Index of each example in its dataset, int64 [B].
        num_tokens: Unique real tokens: no padding, a prefix counted once.
        scored_counts: Scored tokens of each sequence; S plain ints, so that nobody asks the device for them.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    scored: Scored
    ends: Tensor
    groups: Tensor
    totals: StepTotals
    values: dict[str, Tensor]
    tokens: dict[str, Tensor]
    indices: Tensor
    num_tokens: int
    scored_counts: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        """S, branches of all examples."""
        return len(self.ends)

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.indices)

    def to(self, *args: Any, **kwargs: Any) -> MicroBatch:
        """A copy with all tensors moved; Lightning calls this to bring the batch to its device."""
        return _move(self, *args, **kwargs)


@dataclass(frozen=True)
class PromptBatch:
    """Queries to answer: what `PromptDataModule` yields and rollouts, samples and predictions start from.

    Attributes:
        prompt_ids: Token ids of each rendered prompt (generation prompt included), int64 [P_i]; B of them.
        records: The records they come from, as read (reward functions may need their other fields).
        indices: Index of each prompt in its dataset, int64 [B].
        repeats: For each prompt, how often the step holds the same one before it, B numbers; empty = never.
    """

    prompt_ids: tuple[Tensor, ...]
    records: tuple[dict[str, Any], ...]
    indices: Tensor
    repeats: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def to(self, *args: Any, **kwargs: Any) -> PromptBatch:
        """A copy with all tensors moved."""
        return _move(self, *args, **kwargs)


def _move(value: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(*args, **kwargs)
    if isinstance(value, dict):
        return {k: _move(v, *args, **kwargs) if isinstance(v, Tensor) else v for k, v in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(v.to(*args, **kwargs) for v in value)
    if isinstance(value, (MicroBatch, PromptBatch, Scored)):
        moved = {f.name: _move(getattr(value, f.name), *args, **kwargs) for f in fields(value)}
        return replace(value, **moved)
    return value
