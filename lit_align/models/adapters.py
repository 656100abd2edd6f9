"""Low-rank adapters through peft: putting them on, folding them in, telling them from their base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.models.quantization import QuantizedLinear, dequantized_state
from lit_align.models.source import LoraSettings

# peft is imported where adapters are really used: it takes seconds, and most starts do without.
if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG = "adapter_config.json"
TASKS = {"causal": "CAUSAL_LM", "scalar": "SEQ_CLS"}


def add_adapters(model: PreTrainedModel, settings: LoraSettings, kind: str) -> PeftModel:
    """Freezes the model and puts trainable adapters on it; before any step they change nothing.

    Args:
        model: Causal language model or scalar model; it is changed in place.
        settings: Rank, scale, where.
        kind: "causal" or "scalar"; a scalar model's head is new, so it is trained whole and saved with the adapters.
    """
    from peft import get_peft_model

    return get_peft_model(model, lora_config(settings, kind))


def lora_config(settings: LoraSettings, kind: str) -> LoraConfig:
    """The settings as peft takes them; see `add_adapters`."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it by r and asks no more of it
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type=TASKS[kind],
        modules_to_save=["score"] if kind == "scalar" else None,
    )


def is_adapter_folder(path: str | None) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return path is not None and (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").exists()


def modules_saved_whole(folder: str) -> list[str]:
    """Names of the modules that an adapter folder holds whole, beside its low-rank updates."""
    from peft import PeftConfig

    return list(PeftConfig.from_pretrained(folder).modules_to_save or ())


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether the module is a layer with an adapter on it."""
    return hasattr(module, "base_layer") and hasattr(module, "merge")


def merge_adapter_folder(folder: str, load_base: Callable[[str, str | None], PreTrainedModel]) -> PreTrainedModel:
    """Loads an adapter with its base and folds the one into the other.

    Args:
        folder: Where the adapter is.
        load_base: Loads a model from (path or id, revision).

    Returns:
        A plain model, all of its weights trainable.
    """
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(folder)
    if not settings.base_model_name_or_path:
        raise ValueError(f"{folder}/{ADAPTER_CONFIG}: base_model_name_or_path is missing, so the base is not known")
    base = load_base(settings.base_model_name_or_path, settings.revision)
    settings.task_type = None  # an adapter of a causal language model may also start a reward model or a critic
    merged = PeftModel.from_pretrained(base, folder, config=settings).merge_and_unload()
    merged.config._name_or_path = ""  # neither the base's folder nor the adapter's holds these weights
    return merged.requires_grad_(True)


def plain_name(name: str) -> str | None:
    """Name that a parameter of an adapted model has in the plain model; None for what belongs to an adapter."""
    if ".lora_" in name or ".modules_to_save." in name:
        return None
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def merged_state(model: PeftModel, device: str | None = None) -> dict[str, Tensor]:
    """The plain model's weights with the adapters folded in; the model itself is not touched.

    Of a quantised base these are the weights that it stands for, in the model's type: those that were trained on.
    Merging in place and taking it back would leave rounding behind in a model that is still in use.

    Args:
        model: With adapters.
        device: Where weights go that are made here, one after the other: all together they may be many times what a
            quantised base takes. None = where the model is.
    """
    state = {plain: value for name, value in model.state_dict().items() if (plain := plain_name(name))}
    state = dequantized_state(model.get_base_model(), state, model.dtype, device)
    for name, layer in _adapted_layers(model):
        state |= {f"{name}.{key}": value.to(device=device) for key, value in _folded(layer, model.dtype).items()}
    return state


def _adapted_layers(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.get_base_model().named_modules():
        if is_tuner_layer(module) or hasattr(module, "modules_to_save"):
            yield name, module


def _folded(layer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    if not is_tuner_layer(layer):
        return dict(layer.modules_to_save[layer.active_adapter].state_dict())
    layer = deepcopy(layer)  # one layer at a time: the copy costs the memory of one matrix, not of the model
    packed = layer.get_base_layer()
    if isinstance(packed, QuantizedLinear):
        layer.base_layer = packed.plain(dtype)
    layer.merge(safe_merge=True)
    folded = dict(layer.get_base_layer().state_dict())
    if getattr(packed, "transposed", False):
        folded["weight"] = folded["weight"].T.contiguous()
    return folded
