"""Bytes that training keeps on a device, from shapes alone: weights, states, activations, the head, caches.

Plain arithmetic: a network on the meta device says what it is (`shape_of`, `weights_of`), everything else is
multiplication. Each formula stands in docs/plan.md with its meaning. Activations are what autograd keeps for the
backward pass of a decoder layer with RMSNorm or LayerNorm and a gated or a plain feed-forward part; for layers of
another kind they are an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_align.models.adapters import is_tuner_layer
from lit_align.models.flops import active_share, state_bytes
from lit_align.models.forward import base_model
from lit_align.models.projection import BLOCK, KEPT, ROWS

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Shape:
    """What of a network decides how much it keeps.

    Attributes:
        layers: Decoder layers.
        width: H, of a hidden state.
        queries: Width of all query heads together; that of attention's output.
        keys: Width of all key heads together.
        head: Width of one head.
        inner: Width of the feed-forward part; with experts, of those that a token meets together.
        gated: Whether the feed-forward part multiplies two projections.
        steps: Tensors that its activation function keeps: 1, or 4 where it is written out in single operations.
        norms: Norms of width H in a layer.
        head_norms: Norms of single heads in a layer, of queries and of keys.
        rms: Whether norms are RMSNorms, made of single operations; else one LayerNorm operation.
        fan_in: Sum of the input widths of a layer's matrices.
        adapted: Sum of the input widths of those that carry adapters.
        rank: Sum of their ranks.
        vocabulary: V; 0 = the head is a scalar.
        element: Bytes of a weight of the trunk.
    """

    layers: int
    width: int
    queries: int
    keys: int
    head: int
    inner: int
    gated: bool
    steps: int
    norms: int
    head_norms: int
    rms: bool
    fan_in: int
    adapted: int
    rank: int
    vocabulary: int
    element: int


@dataclass(frozen=True)
class Weights:
    """Sizes of a network's parameters, a shared one counted once.

    Attributes:
        trained: Numbers that are trained.
        trained_bytes: Their bytes.
        frozen_bytes: Bytes of all others.
        matrices: Numbers in the matrices of the layers: what autocast copies.
        layer_bytes: Bytes of one layer.
        table: Numbers of the trained embedding table; 0 = it is frozen.
        head: Numbers of the trained vocabulary projection; 0 = it is frozen, or there is none.
    """

    trained: int
    trained_bytes: int
    frozen_bytes: int
    matrices: int
    layer_bytes: int
    table: int
    head: int

    @property
    def total_bytes(self) -> int:
        """Of all parameters."""
        return self.trained_bytes + self.frozen_bytes


def shape_of(model: nn.Module) -> Shape:
    """Reads the shape of a causal language model or scalar model, with adapters or without, on any device."""
    inner: Any = base_model(model)
    config = inner.config.get_text_config()
    layers = _layers(inner, config.num_hidden_layers)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = list(_matrices(layers[0]))
    norms = [module for module in layers[0].modules() if _is_norm(module)]
    wide = [norm for norm in norms if norm.weight.numel() == config.hidden_size]
    adapted = [module for module in layers[0].modules() if is_tuner_layer(module)]
    output = inner.get_output_embeddings()
    return Shape(
        layers=len(layers),
        width=config.hidden_size,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        head=size,
        inner=_inner(config),
        gated=any("gate" in name.split(".")[-1] for name, _ in layers[0].named_modules() if "experts" not in name)
        or active_share(config) < 1,
        steps=4 if any("NewGELU" in type(module).__name__ for module in layers[0].modules()) else 1,
        norms=len(wide),
        head_norms=len(norms) - len(wide),
        rms=not any(isinstance(norm, nn.LayerNorm) for norm in norms),
        fan_in=sum(fan_in for fan_in, _ in matrices),
        adapted=sum(layer.in_features for layer in adapted),
        rank=sum(sum(layer.r.values()) for layer in adapted),
        vocabulary=0 if output is None else output.weight.shape[0],
        element=next(layers[0].parameters()).element_size(),
    )


def weights_of(model: nn.Module) -> Weights:
    """Counts the parameters of a network on any device."""
    inner: Any = base_model(model)
    layers = _layers(inner, inner.config.get_text_config().num_hidden_layers)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    trained_bytes = sum(map(_bytes, trained))
    table, output = inner.get_input_embeddings().weight, inner.get_output_embeddings()
    return Weights(
        trained=sum(p.numel() for p in trained),
        trained_bytes=trained_bytes,
        frozen_bytes=sum(map(_bytes, parameters)) - trained_bytes,
        matrices=sum(weight.numel() for layer in layers for _, weight in _matrices(layer)),
        layer_bytes=sum(map(_bytes, layers[0].parameters())),
        table=table.numel() if table.requires_grad else 0,
        head=output.weight.numel() if output is not None and output.weight.requires_grad else 0,
    )


def _layers(inner: Any, number: int) -> nn.ModuleList:
    found = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if not found:
        raise ValueError(f"{type(inner).__name__}: found no list of {number} layers, so its memory cannot be planned")
    return found[0]


def _matrices(layer: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Input width and weight of each matrix of a layer; what adapters add is left out."""
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if ".lora_" in name or is_tuner_layer(module) or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        yield getattr(module, "in_features", weight.shape[0]), weight


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and "norm" in type(module).__name__.lower()


def _inner(config: Any) -> int:
    names = ("intermediate_size", "n_inner", "ffn_dim")
    size = next((found for name in names if (found := getattr(config, name, None))), 4 * config.hidden_size)
    if active_share(config) == 1:
        return size
    return (getattr(config, "moe_intermediate_size", None) or size) * config.num_experts_per_tok


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


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
    least, most = ROWS[device]
    rows = min(max(KEPT[device] // shape.vocabulary, least), most)
    rows = min(scored, max(rows, part))
    narrow = device == "cuda" and (mixed or shape.element == 2)
    if device == "cpu":
        chunk = rows * (shape.vocabulary + BLOCK) * FLOAT
    else:  # logits beside their exponentials; in 16 bits a narrow copy, and the gradient of all rows before it is added
        chunk = rows * shape.vocabulary * 2 * FLOAT + (trained * FLOAT if narrow else 0)
    chunk += 2 * rows * shape.width * FLOAT
    if device == "cpu" and shape.element == 2:
        chunk += BLOCK * shape.width * FLOAT
    return HeadBytes(states, chunk, trained * FLOAT)


def kv_bytes(shape: Shape, rows: int, columns: int, mixed: bool) -> int:
    """Keys and values of answers side by side.

    Args:
        shape: Of the policy.
        rows: Answers side by side.
        columns: Tokens of a row: the longest prompt and answer, and some to spare.
        mixed: Under autocast keys leave the rotation in float32, and values stay in 16 bits.
    """
    pair = FLOAT + 2 if mixed else 2 * shape.element
    return rows * columns * shape.layers * shape.keys * pair


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
    probe = nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    optimizer = build([probe])
    optimizer.step()
    return state_bytes(optimizer) / probe.numel()
