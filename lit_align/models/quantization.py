"""Quantised bases for LoRA (QLoRA): matrices of frozen networks in 4 or 8 bits, through bitsandbytes.

bitsandbytes quantises, and turns packed weights back; the layer is this library's own. bitsandbytes' layers give other
numbers in evaluation than in training on some CPUs (they repack their weights in bfloat16), are wrong in 4 bits on a
CPU where the input's width is no multiple of 64, and in 8 bits let an example's result depend on those beside it
(outlier columns are looked for over the whole micro-batch), under a gradient that is not that of the forward pass. Here
a packed matrix is the matrix that it stands for, in training and in evaluation, on any device, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

# bitsandbytes is imported where it is really used: it takes seconds.
if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale in NF4, and scales that share a scale of their own (double quantisation)."""
FLOAT = 4


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in 4 or 8 bits; it computes with what these stand for.

    nf4 (QLoRA, https://arxiv.org/abs/2305.14314): weight = code[index] * scale of its block of 64, 16 codes; scales =
    map[byte] * scale of their block of 256 + mean of all scales. int8 (the weights of LLM.int8(),
    https://arxiv.org/abs/2208.07339): weight = integer * largest magnitude of its row / 127.

    It computes in the type of its input, under autocast in that of autocast.

    Attributes:
        kind: "nf4" or "int8".
        weight: uint8 [in * out / 2 (rounded up), 1], two indices a byte, row by row; or int8 [out, in].
        block_scales: nf4 alone: uint8 [blocks of 64].
        scales: Bytes of float32 numbers: of nf4 the scales of `block_scales` and the mean; of int8 one for each row.
            As bytes, a cast of the network's floats does not reach them.
        bias: [out] or None, not quantised.
        transposed: Whether the layer stands for a `Conv1D`, whose weight is [in, out].
    """

    def __init__(
        self, in_features: int, out_features: int, kind: str, bias: Tensor | None = None, transposed: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind, self.transposed = in_features, out_features, kind, transposed
        blocks = -(-in_features * out_features // BLOCK)
        if kind == "nf4":
            self.weight = _frozen(torch.empty(-(-in_features * out_features // 2), 1, dtype=torch.uint8))
            self.block_scales = _frozen(torch.empty(blocks, dtype=torch.uint8))
            numbers = -(-blocks // SCALES_BLOCK) + 1
        else:
            self.weight = _frozen(torch.empty(out_features, in_features, dtype=torch.int8))
            numbers = out_features
        self.scales = _frozen(torch.empty(FLOAT * numbers, dtype=torch.uint8))
        self.bias: nn.Parameter | None = None if bias is None else _frozen(bias.detach())  # type: ignore[assignment]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the layer stands for, [out, in]; computed in float32, rounded to `dtype` at the end."""
        if self.kind == "int8":
            rows = self.scales.view(torch.float32)[:, None] / 127
            return self.weight.to(dtype).mul_(rows)  # torch multiplies in float32 and rounds once
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self._state(dtype)).view(self.out_features, self.in_features)

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer with the matrix that this one stands for."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = _frozen(self.dequantized(dtype))
        layer.bias = self.bias  # type: ignore[assignment]
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            product = _PackedProduct.apply(x, self)
            return product if self.bias is None else product + self.bias.to(x.dtype)

    def _state(self, dtype: torch.dtype) -> QuantState:
        from bitsandbytes.functional import QuantState

        codes, scale_map = _tables(self.weight.device)
        scales = self.scales.view(torch.float32)
        of_scales = QuantState(scales[:-1], code=scale_map, blocksize=SCALES_BLOCK, dtype=torch.float32)
        # As one row: bitsandbytes' kernel for CPUs begins a block anew in each row, where `in` is no multiple of 64.
        shape = torch.Size((1, self.out_features * self.in_features))
        return QuantState(self.block_scales, shape, codes, BLOCK, "nf4", dtype, scales[-1], of_scales)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"


class _PackedProduct(torch.autograd.Function):
    """x W^T, W turned back from its bytes in both passes: what stays for the backward pass are the bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dequantized(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """NF4's 16 codes and the 256 numbers of a scale's byte, float32; the same for all layers."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


# -- reading


def bnb_config(kind: str) -> BitsAndBytesConfig:
    """What makes `from_pretrained` quantise while it reads, a matrix at a time; scales are left to `adopt`."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)


def quantizing_options(kind: str, name: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`. Weights are quantised on the CPU, so that they are the same on every machine.

    Raises:
        ValueError: bitsandbytes is not there, or does not work here.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, PackageNotFoundError) as error:
        raise ValueError(
            f"{name}.quantization: {kind} needs bitsandbytes, which cannot be imported here ({error}); install it "
            "(pip install bitsandbytes), or leave quantization out"
        ) from error
    if "cpu" not in getattr(bitsandbytes, "supported_torch_devices", {"cpu"}):
        raise ValueError(
            f"{name}.quantization: bitsandbytes {bitsandbytes.__version__} does not work on a CPU, where weights are "
            "quantised; install 0.48 or later, or leave quantization out"
        )
    return {"quantization_config": bnb_config(kind), "device_map": {"": "cpu"}}


def refuse_shards(name: str) -> None:
    """Raises ValueError: a quantised network and strategy fsdp2 do not go together."""
    raise ValueError(
        f"{name}.quantization: packed weights cannot be shared out between devices (strategy fsdp2); use strategy ddp, "
        "where each device holds all of them, or leave quantization out"
    )


def adopt(model: PreTrainedModel, kind: str) -> None:
    """Puts a `QuantizedLinear` in the place of each layer that bitsandbytes has quantised; in place.

    Afterwards nothing of the model, nor of its configuration, says that it is bitsandbytes'.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, layer in list(model.named_modules()):
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            transposed = layer.source_cls is Conv1D
            own = QuantizedLinear(layer.in_features, layer.out_features, kind, layer.bias, transposed)
            with torch.no_grad():
                (_take_int8 if kind == "int8" else _take_nf4)(own, layer)
            model.set_submodule(name, own)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_device_map"):
        if hasattr(model, mark):
            delattr(model, mark)


def _take_int8(own: QuantizedLinear, layer: Any) -> None:
    own.weight.copy_(layer.weight.data)
    own.scales.copy_(layer.weight.SCB.float().contiguous().view(torch.uint8))


def _take_nf4(own: QuantizedLinear, layer: Any) -> None:
    from bitsandbytes.functional import quantize_blockwise

    _, scale_map = _tables(torch.device("cpu"))
    own.weight.copy_(layer.weight.data)
    scales = layer.weight.quant_state.absmax.float()
    # In float64, so that neither the number of threads nor the kind of CPU decides its last bit.
    mean = scales.double().mean().float()
    packed, state = quantize_blockwise(scales - mean, code=scale_map, blocksize=SCALES_BLOCK)
    own.block_scales.copy_(packed)
    own.scales.copy_(torch.cat([state.absmax.float(), mean[None]]).view(torch.uint8))


def dequantized_state(
    model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, device: str | None = None
) -> dict[str, Tensor]:
    """A plain model's state dict out of one with packed weights.

    Args:
        model: Without a wrapper; its layers may have adapters on them.
        state: By the plain model's names, the parts of packed weights among them.
        dtype: Of the weights that the packed ones stand for.
        device: Where these go, one after the other; None = where they are.
    """
    plain = dict(state)
    for name, layer in quantized_layers(model):
        name = name.removesuffix(".base_layer")
        for part in ("block_scales", "scales"):
            plain.pop(f"{name}.{part}", None)
        weight = layer.dequantized(dtype).to(device=device)
        plain[f"{name}.weight"] = weight.T.contiguous() if layer.transposed else weight
    return plain


# -- what is quantised


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Name and layer of each quantised matrix; under adapters too."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear))


def quantization_of(model: nn.Module) -> str | None:
    """How the model's matrices are quantised; None = they are not."""
    return next((layer.kind for _, layer in quantized_layers(model)), None)


def quantize_shapes(model: PreTrainedModel, kind: str) -> None:
    """Exchanges the layers that would be quantised in a model on the meta device, in place."""
    kept = get_keys_to_not_convert(model)
    for name, layer in list(model.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or not should_convert_module(name, kept):
            continue
        transposed = isinstance(layer, Conv1D)
        columns, rows = layer.weight.shape if transposed else layer.weight.shape[::-1]
        model.set_submodule(name, QuantizedLinear(columns, rows, kind, layer.bias, transposed))


def packed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that packed weights are made of: they are no numbers of the network's own."""
    parts = ("weight", "block_scales", "scales")
    return {f"{name}.{part}" for name, _ in quantized_layers(model) for part in parts}


def weight_count(model: nn.Module) -> int:
    """Weights of a network, of a packed matrix as many as it stands for."""
    packed = packed_names(model)
    stands_for = sum(layer.in_features * layer.out_features for _, layer in quantized_layers(model))
    return stands_for + sum(p.numel() for name, p in model.named_parameters() if name not in packed)


def tell_share(model: nn.Module, name: str) -> None:
    """Says which share of the weights is quantised: embeddings, heads, and experts in one tensor, are not."""
    from lightning.pytorch.utilities import rank_zero_info

    layers = [layer for _, layer in quantized_layers(model)]
    share = sum(layer.in_features * layer.out_features for layer in layers) / weight_count(model)
    rank_zero_info(f"{name}: {len(layers)} matrices in {quantization_of(model)}, {share:.0%} of its weights")
