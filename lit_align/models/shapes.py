"""What of a network decides how much memory it takes: its widths, and the sizes of its parameters; on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_align.models.adapters import is_tuner_layer
from lit_align.models.flops import active_experts, active_share, head_width, layer_configs
from lit_align.models.forward import base_model
from lit_align.models.quantization import quantized_layers


@dataclass(frozen=True)
class Shape:
    """What of a network decides how much it keeps.

    Attributes:
        layers: Decoder layers.
        width: H, of a hidden state.
        queries: Width of all query heads together; that of attention's output. The mean where layers differ.
        keys: Width of all key heads together; the same.
        head: Width of the widest head.
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
        matrices: Numbers in the matrices of the layers: what autocast copies. Quantised ones are not among them.
        layer_bytes: Bytes of the largest layer.
        layers_bytes: Bytes of all layers.
        table: Numbers of the trained embedding table; 0 = it is frozen.
        head: Numbers of the trained vocabulary projection; 0 = it is frozen, or there is none.
        packed: Numbers of the largest quantised matrix, which is turned back while it computes; 0 = there is none.
    """

    trained: int
    trained_bytes: int
    frozen_bytes: int
    matrices: int
    layer_bytes: int
    layers_bytes: int
    table: int
    head: int
    packed: int

    @property
    def total_bytes(self) -> int:
        """Of all parameters."""
        return self.trained_bytes + self.frozen_bytes


def shape_of(model: nn.Module) -> Shape:
    """Reads the shape of a causal language model or scalar model, with adapters or without, on any device."""
    inner: Any = base_model(model)
    config = inner.config.get_text_config()
    layers = _layers(inner, config.num_hidden_layers)
    if not getattr(config, "num_attention_heads", None):
        raise ValueError(
            f"{type(inner).__name__}: its configuration names no heads of attention, so its memory cannot be planned"
        )
    norms = [module for module in layers[0].modules() if _is_norm(module)]
    wide = [norm for norm in norms if norm.weight.numel() == config.hidden_size]
    adapted = [[module for module in layer.modules() if is_tuner_layer(module)] for layer in layers]
    output = inner.get_output_embeddings()
    return Shape(
        layers=len(layers),
        width=config.hidden_size,
        **_heads(config),
        inner=_inner(config),
        gated=any("gate" in name.split(".")[-1] for name, _ in layers[0].named_modules() if "experts" not in name)
        or active_share(config) < 1,
        steps=4 if any("NewGELU" in type(module).__name__ for module in layers[0].modules()) else 1,
        norms=len(wide),
        head_norms=len(norms) - len(wide),
        rms=not any(isinstance(norm, nn.LayerNorm) for norm in norms),
        fan_in=_mean(sum(fan_in for fan_in, _ in _matrices(layer)) for layer in layers),
        adapted=_mean(sum(module.in_features for module in some) for some in adapted),
        rank=_mean(sum(sum(module.r.values()) for module in some) for some in adapted),
        vocabulary=0 if output is None else output.weight.shape[0],
        element=next(_wide(layers[0])).element_size(),
    )


def _heads(config: Any) -> dict[str, int]:
    """Widths of attention, over layers that differ their mean: what all layers keep is the same."""
    layers = layer_configs(config)
    shared = getattr(config, "kv_sharing_modes", None) or [None] * len(layers)  # "reuse" = keys of a layer before
    keys = [(getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head_width(c) for c in layers]
    return {
        "queries": _mean(c.num_attention_heads * head_width(c) for c in layers),
        "keys": _mean(0 if mode == "reuse" else width for width, mode in zip(keys, shared, strict=True)),
        "head": max(map(head_width, layers)),
    }


def _mean(sizes: Iterable[int]) -> int:
    values = list(sizes)
    return round(sum(values) / len(values))


def weights_of(model: nn.Module) -> Weights:
    """Counts the parameters of a network on any device."""
    inner: Any = base_model(model)
    layers = _layers(inner, inner.config.get_text_config().num_hidden_layers)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    trained_bytes = sum(map(_bytes, trained))
    sizes = [sum(map(_bytes, layer.parameters())) for layer in layers]
    table, output = inner.get_input_embeddings().weight, inner.get_output_embeddings()
    return Weights(
        trained=sum(p.numel() for p in trained),
        trained_bytes=trained_bytes,
        frozen_bytes=sum(map(_bytes, parameters)) - trained_bytes,
        matrices=sum(w.numel() for layer in layers for _, w in _matrices(layer) if w.is_floating_point()),
        layer_bytes=max(sizes),
        layers_bytes=sum(sizes),
        table=table.numel() if table.requires_grad else 0,
        head=output.weight.numel() if output is not None and output.weight.requires_grad else 0,
        packed=max((m.in_features * m.out_features for _, m in quantized_layers(inner)), default=0),
    )


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen trunk under a model's adapters: what a network on another's trunk does not hold itself."""
    trunk = base_model(model).base_model
    return sum(_bytes(p) for name, p in trunk.named_parameters() if ".lora_" not in name)


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


def _wide(layer: nn.Module) -> Iterator[Tensor]:
    """A layer's own weights in floating point: not its adapters', nor what is packed."""
    return (p for name, p in layer.named_parameters() if p.is_floating_point() and ".lora_" not in name)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and "norm" in type(module).__name__.lower()


def _inner(config: Any) -> int:
    names = ("intermediate_size", "n_inner", "ffn_dim")
    size = next((found for name in names if (found := getattr(config, name, None))), 4 * config.hidden_size)
    if isinstance(size, (list, tuple)):  # one of each layer
        size = _mean(size)
    if getattr(config, "use_double_wide_mlp", False):  # of layers that have no keys of their own
        size = _mean(size * (1 + (mode == "reuse")) for mode in config.kv_sharing_modes)
    size += getattr(config, "hidden_size_per_layer_input", None) or 0  # a second part of its kind, for each layer
    if active_share(config) == 1:
        return size
    beside = size if getattr(config, "enable_moe_block", False) else 0  # a dense part, besides the experts
    return beside + (getattr(config, "moe_intermediate_size", None) or size) * active_experts(config)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()
