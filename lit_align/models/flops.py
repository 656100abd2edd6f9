"""Model FLOPs: the floating point operations that a step asks for, however it is computed.

A multiply-add counts 2. What is counted: matrices of the trunk for each unique real token, the head for each scored
token, scores and sums of causal attention for each (query, key) pair that may attend. Never padding, repeated
prefixes, activations that are computed again, or masked attention; element-wise work (norms, activations, softmax) is
left out, as the field does. So a share of a machine's rate that is made of it cannot be raised by doing work twice.

A backward pass through a matrix costs one product for its input, and one more for its weight if that is trained: 3
times the forward pass in full training, 2 times where the matrix is frozen. Attention has no weights: always 3 times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_align.batch.work import Work
from lit_align.models.adapters import is_tuner_layer
from lit_align.models.forward import base_model
from lit_align.models.scalar import HEAD


@dataclass(frozen=True)
class Flops:
    """What each unit of work costs, in floating point operations.

    Attributes:
        token: Per unique token.
        scored: Per scored token.
        sequence: Per sequence.
        pair: Per attended (query, key) pair.
    """

    token: float = 0.0
    scored: float = 0.0
    sequence: float = 0.0
    pair: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.token + other.token,
            self.scored + other.scored,
            self.sequence + other.sequence,
            self.pair + other.pair,
        )

    def of(self, work: Work) -> float:
        """FLOPs of a micro-batch, or of several added up."""
        return (
            self.token * work.tokens
            + self.scored * work.scored
            + self.sequence * work.sequences
            + self.pair * work.attended
        )


def forward_flops(model: nn.Module, head_at: Literal["scored", "ends"] = "scored", adapters: bool = True) -> Flops:
    """A pass without gradient: a reference, a reward model, old log-probabilities.

    Args:
        model: Causal language model or scalar model, with adapters or without; it may lie on the meta device, as
            only shapes and the configuration are looked at.
        head_at: Where the head is used: at scored tokens, or at the end of each sequence (reward models).
        adapters: False = they are switched off.
    """
    return _flops(model, head_at, adapters, frozen=1, trained=1)


def training_flops(model: nn.Module, head_at: Literal["scored", "ends"] = "scored") -> Flops:
    """A forward and a backward pass; what is trained is told by `requires_grad`. Arguments as in `forward_flops`."""
    return _flops(model, head_at, True, frozen=2, trained=3)


def _flops(model: nn.Module, head_at: str, adapters: bool, frozen: int, trained: int) -> Flops:
    inner: Any = base_model(model)

    def passes(weight: Tensor) -> int:
        return trained if weight.requires_grad else frozen

    matrices = _matrices(inner.base_model, active_share(inner.config.get_text_config()), adapters)
    token = sum(2.0 * size * passes(weight) for size, weight in matrices)
    output = inner.get_output_embeddings()
    weight = _scalar_weight(inner) if output is None else output.weight
    head = 2.0 * _size(output, weight) * passes(weight)
    at = {"scored": head} if head_at == "scored" else {"sequence": head}
    return Flops(token=token, pair=_pair_flops(inner.config.get_text_config()) * trained, **at)


def _matrices(trunk: nn.Module, active_share: float, adapters: bool) -> Iterator[tuple[float, Tensor]]:
    """Number of weights that a token meets, and the parameter: every weight of two or more dimensions but tables."""
    for name, module in trunk.named_modules():
        table, idle = isinstance(module, nn.Embedding), not adapters and ".lora_" in name
        if table or idle or is_tuner_layer(module):  # the last one's matrices are its children's
            continue
        share = active_share if "experts" in name.split(".") else 1.0
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:
                yield share * _size(module, weight), weight


def _size(module: nn.Module | None, weight: Tensor) -> int:
    # A quantised weight is stored in another shape than it has.
    known = isinstance(module, nn.Linear)
    return module.in_features * module.out_features if known else weight.numel()  # type: ignore[union-attr]


def active_share(config: Any) -> float:
    """Share of its experts that a token meets; 1 without experts.

    Raises:
        ValueError: The configuration does not say how many it meets.
    """
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(config, name, None))), None)
    return 1.0 if experts is None else active_experts(config) / experts


def active_experts(config: Any) -> int:
    """How many of its experts a token meets. Raises ValueError: the configuration does not say so."""
    names = ("num_experts_per_tok", "top_k_experts")
    number = next((number for name in names if (number := getattr(config, name, None))), None)
    if not isinstance(number, int):  # some have one for each layer
        raise ValueError(f"{config.model_type}: its configuration does not say how many experts a token meets")
    return number


def layer_configs(config: Any) -> list[Any]:
    """The configuration of each layer: the network's own, but where an architecture's layers differ."""
    return list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)


def head_width(config: Any) -> int:
    """Width of one head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _scalar_weight(model: nn.Module) -> Tensor:
    # With adapters the head is trained whole, and peft keeps an idle copy of it beside.
    weights = [p for p in getattr(model, HEAD).parameters() if p.ndim > 1]
    return next((weight for weight in weights if weight.requires_grad), weights[0])


def _pair_flops(config: Any) -> float:
    """Scores and weighted sum of one (query, key) pair, over all heads of all layers with attention."""
    layers = layer_configs(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    attends = ("attention" in kind and "linear" not in kind for kind in kinds)
    return sum(_layer_pair_flops(layer) for layer, does in zip(layers, attends, strict=False) if does)


def _layer_pair_flops(config: Any) -> float:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # its layers have no attention
        return 0.0
    query = getattr(config, "qk_head_dim", None) or head_width(config)
    value = getattr(config, "v_head_dim", None) or head_width(config)
    return 2.0 * heads * (query + value)


def update_bytes(parameters: Iterable[Tensor], state_bytes: int | None = None) -> int:
    """Bytes that an optimizer step moves at least, on the device that holds these parameters.

    Each weight and each number of the optimizer's state is read and written, each gradient written by the backward
    pass and read: 32 bytes a float32 parameter with Adam's two moments, 16 in bfloat16.

    Args:
        parameters: Trained ones; of sharded ones this device's part counts.
        state_bytes: Of the optimizer's whole state; None = two moments of each weight's own type.
    """
    local = [_local(p) for p in parameters if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in local)
    return 4 * weights + 2 * (2 * weights if state_bytes is None else state_bytes)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state as it is now (none before its first step): as `update_bytes` takes it."""
    values = (value for state in optimizer.state.values() for value in state.values())
    local = [_local(value) for value in values if isinstance(value, Tensor) and value.ndim > 0]
    return sum(value.numel() * value.element_size() for value in local)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
