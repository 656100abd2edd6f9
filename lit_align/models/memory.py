"""Bytes that training keeps on a device, from shapes alone: states, activations, the head, caches, and what is sent.

Plain arithmetic: a network on the meta device says what it is (`shapes`), everything else is multiplication. Each
formula stands in docs/plan.md with its meaning. Activations are what autograd keeps for the backward pass of a decoder
layer with RMSNorm or LayerNorm and a gated or a plain feed-forward part; for layers of another kind they are an
estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from lit_align.models.flops import state_bytes
from lit_align.models.projection import BLOCK, chunk_rows
from lit_align.models.shapes import Shape

FLOAT = 4
"""Bytes of a float32."""


def layer_bytes(shape: Shape, mixed: bool, frozen: bool) -> int:
    """What autograd keeps of one layer for each token.

    Args:
        shape: Of the network.
        mixed: Whether autocast computes in 16 bits over wider weights.
        frozen: Whether the layer's own weights are frozen (adapters on them).
    """
    state = shape.element
    compute = 2 if mixed else state
    wide = FLOAT if mixed or shape.rms else state  # what a norm computes in
    norm = wide + (state if shape.rms and not frozen else 0)
    statistics = FLOAT if shape.rms else 2 * FLOAT
    kept = shape.norms * (shape.width * norm + statistics)
    if shape.head_norms:  # one of queries, one of keys
        kept += (shape.queries + shape.keys) * norm + (shape.queries + shape.keys) // shape.head * statistics
    kept += compute * 2 * (shape.queries + shape.keys)  # queries, keys, values, output
    kept += compute * shape.inner * (shape.steps + (2 if shape.gated else 0))
    return kept + _inputs(shape, mixed, frozen, compute)


def _inputs(shape: Shape, mixed: bool, frozen: bool, compute: int) -> int:
    """Inputs of the matrices, as far as nothing else keeps them: attention's output is kept already."""
    if not frozen:
        # Autocast makes a copy for each matrix of what is not in 16 bits yet: of what the norms give out.
        return compute * (shape.fan_in - shape.queries if mixed else 2 * shape.width + shape.inner)
    if not shape.adapted:
        return 0
    if mixed:
        return 2 * (shape.adapted + shape.rank)
    if compute == FLOAT:
        return FLOAT * (min(shape.adapted, 2 * shape.width + shape.inner) + shape.rank)
    return FLOAT * (shape.adapted + shape.rank)  # adapters are in float32, and each makes a copy


def trunk_bytes(shape: Shape, tokens: int, mixed: bool, frozen: bool, checkpointing: bool) -> int:
    """Activations of a micro-batch, without the head.

    With checkpointing each layer keeps its input alone, and one layer at a time is computed again.

    Args:
        shape: Of the network.
        tokens: Positions that the trunk computes in a micro-batch.
        mixed: See `layer_bytes`.
        frozen: See `layer_bytes`.
        checkpointing: Whether activations are computed again in the backward pass.
    """
    layer, state = layer_bytes(shape, mixed, frozen), shape.element
    last = shape.width * (FLOAT + state * (not frozen)) + FLOAT  # the last norm
    last += 2 * shape.head * state + 8  # the rotation's cosines and sines, the ids of the embedding
    if not checkpointing:
        return tokens * (shape.layers * layer + last)
    return tokens * (shape.layers * shape.width * state + layer + last)


@dataclass(frozen=True)
class HeadBytes:
    """Memory of the vocabulary projection's walk.

    Attributes:
        states: Hidden states of the scored tokens, and their gradient.
        chunk: Exponentials of a chunk of rows and what works on them; free again when the walk is over.
        gradient: Of the projection's weight, float32.
    """

    states: int
    chunk: int
    gradient: int

    @property
    def total(self) -> int:
        """At the end of the walk's last chunk."""
        return self.states + self.chunk + self.gradient


def head_bytes(shape: Shape, scored: int, device: str, mixed: bool, trained: int, part: int = 0) -> HeadBytes:
    """What the head holds at its peak.

    Args:
        shape: Of the network.
        scored: Scored tokens of the micro-batch.
        device: "cpu" or "cuda": they set the rows of a chunk (`models.projection`).
        mixed: Whether autocast computes in 16 bits.
        trained: Numbers of the head's weight if it is trained, else 0.
        part: Scored tokens of the largest example, where a loss needs whole examples.
    """
    states = 2 * scored * shape.width * shape.element
    if not shape.vocabulary:
        return HeadBytes(states, 0, 0)
    rows = min(scored, max(chunk_rows(shape.vocabulary, torch.device(device)), part))
    narrow = device == "cuda" and (mixed or shape.element == 2)
    if device == "cpu":
        chunk = rows * (shape.vocabulary + BLOCK) * FLOAT
    else:  # logits beside their exponentials; in 16 bits a narrow copy, and the gradient of all rows before it is added
        chunk = rows * shape.vocabulary * 2 * FLOAT + (trained * FLOAT if narrow else 0)
    chunk += 2 * rows * shape.width * FLOAT
    if device == "cpu" and shape.element == 2:
        chunk += BLOCK * shape.width * FLOAT
    return HeadBytes(states, chunk, trained * FLOAT)


def kv_bytes(shape: Shape, rows: int, columns: int) -> int:
    """Keys and values of answers side by side, in the weights' data type; under autocast too, as the cache widens them.

    Args:
        shape: Of the policy.
        rows: Answers side by side.
        columns: Tokens of a row: the longest prompt and answer, and some to spare.
    """
    return rows * columns * shape.layers * 2 * shape.keys * shape.element


def all_reduce_bytes(size: int, devices: int) -> int:
    """What a device sends (and receives) in a ring all-reduce of `size` bytes."""
    return 2 * size * (devices - 1) // devices


def all_gather_bytes(size: int, devices: int) -> int:
    """What a device sends in an all-gather to, or a reduce-scatter of, `size` bytes in all."""
    return size * (devices - 1) // devices


def state_per_weight(build: Callable[..., Optimizer], dtype: torch.dtype) -> float:
    """Bytes of an optimizer's state for each weight; seen by letting it make a step on a small matrix on the CPU.

    Args:
        build: Makes the optimizer of a list of parameters.
        dtype: Of the weights.
    """
    probe = nn.Parameter(torch.zeros(512, 512, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    optimizer = build([probe])
    optimizer.step()
    return state_bytes(optimizer) / probe.numel()
