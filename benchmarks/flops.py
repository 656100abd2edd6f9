"""Useful floating-point operations: what the mathematics needs, not what a program spends.

No padding, no prompt twice, no masked half of the attention, no recomputation, and the vocabulary projection of scored
tokens alone. So the ratio to the floor falls with every kind of waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PASSES = {"train": 3, "forward": 1}
"""Forward-equivalents: a backward pass is two."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes.

    Attributes:
        layers: L.
        hidden: H.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: D.
        intermediate: Width of the gated feed-forward layer.
        vocabulary: V.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict) -> Shape:
        """From a model's configuration (Llama and its relatives)."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
        )

    @property
    def layer_weights(self) -> int:
        """Of one layer's matrices: four of attention, three of the feed-forward layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


def attended(prompt: int, branches: Sequence[int]) -> int:
    """Query-key pairs, twice: P^2 of the prompt, 2PR + R^2 of each branch that hangs from it."""
    return prompt**2 + sum(2 * prompt * size + size**2 for size in branches)


def trunk(shape: Shape, prompt: int, branches: Sequence[int]) -> int:
    """Of one forward pass through the layers, for a prompt and its branches."""
    attention = 2 * shape.layers * shape.heads * shape.head_dim * attended(prompt, branches)
    return matrices(shape, prompt, branches) + attention


def matrices(shape: Shape, prompt: int, branches: Sequence[int]) -> int:
    """What of `trunk` has weights: all but attention's own products."""
    return 2 * shape.layers * shape.layer_weights * (prompt + sum(branches))


def head(shape: Shape, scored: int) -> int:
    """Of the vocabulary projection of so many tokens, forward."""
    return 2 * shape.hidden * shape.vocabulary * scored


def example(shape: Shape, stage: str, prompt: int, branches: Sequence[int], scored: int) -> int:
    """One example of one optimizer step.

    DPO counts the reference's forward pass, once. RM has no vocabulary projection.
    """
    forward = trunk(shape, prompt, branches)
    if stage == "rm":
        return PASSES["train"] * forward
    forward += head(shape, scored)
    return (PASSES["train"] + (stage == "dpo")) * forward


def ppo_iteration(shape: Shape, prompts: Sequence[int], response: int, epochs: int) -> int:
    """One iteration: answers sampled, scored by four networks, and `epochs` updates of policy and critic.

    Sampling is a forward pass too: each prompt and sampled token once, and the projection of each sampled token. Old
    log-probabilities come with it; the reference has a projection as well, the reward model and the critic have not.
    """
    body = sum(trunk(shape, prompt, [response]) for prompt in prompts)
    scores = head(shape, response * len(prompts))
    rollout, reference, reward, critic = body + scores, body + scores, body, body
    update = PASSES["train"] * (body + scores) + PASSES["train"] * body
    return rollout + reference + reward + critic + epochs * update
