"""Folders that hold adapters without their base: what they were made like, and putting them on a base that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_align.models.adapters import ADAPTER_CONFIG, lora_config
from lit_align.models.scalar import HEAD
from lit_align.models.source import LoraSettings

WEIGHTS = "adapter_model.safetensors"
NOT_COMPARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "modules_to_save",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)
"""Entries of an adapter's settings that say where it came from, or that its weights are compared for anyway."""


def base_of(folder: str) -> tuple[str, str | None]:
    """Folder or id, and revision, of the model that an adapter was trained on; empty = it does not say."""
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    return settings.base_model_name_or_path or "", settings.revision


def adapter_settings(folder: str, name: str) -> LoraSettings:
    """What the adapters of a folder are like.

    Args:
        folder: Holds `adapter_config.json`.
        name: What the user calls the source ("reward_model", ...); it starts error messages.

    Raises:
        ValueError: They are more than plain low-rank adapters, which are all that this library makes.
    """
    from peft import LoraConfig, PeftConfig

    found = PeftConfig.from_pretrained(folder)
    if not isinstance(found, LoraConfig) or found.r is None:
        raise ValueError(f"{name}.path: expected low-rank adapters in {folder!r}; got {found.peft_type}")
    targets = found.target_modules or []
    settings = LoraSettings(
        r=found.r,
        alpha=found.lora_alpha,
        dropout=found.lora_dropout,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
    )
    ours, theirs = lora_config(settings, "scalar").to_dict(), found.to_dict()
    if other := [key for key in theirs if key not in NOT_COMPARED and theirs[key] != ours.get(key)]:
        some = ", ".join(f"{key}: {theirs[key]}" for key in other)
        raise ValueError(
            f"{name}.path: the adapters in {folder!r} are not plain low-rank ones ({some} in {ADAPTER_CONFIG}); fold "
            "them into their base and give each network its own weights"
        )
    return settings


@torch.no_grad()
def read_adapters(model: nn.Module, folder: str) -> None:
    """Puts the weights of an adapter folder in the place of a model's own adapters, and of its head if there is one.

    Args:
        model: With adapters as `adapter_settings` says; whole, not sharded.
        folder: Its weights are read as data alone (safetensors).

    Raises:
        ValueError: The folder does not hold exactly the model's adapters; a head alone may be absent.
    """
    from safetensors.torch import load_file

    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder}: expected {WEIGHTS}; export the adapter with for_trunk=true")
    stored = load_file(file)
    own = {_stored_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    absent = [name for name in own if name not in stored and f".{HEAD}." not in name]
    unknown = [name for name in stored if name not in own]
    other = [name for name in stored if name in own and stored[name].shape != own[name].shape]
    if absent or unknown or other:
        raise ValueError(
            f"{file} does not fit the model: {_some(absent)} absent, {_some(unknown)} unknown, {_some(other)} of "
            "another shape; its base is another model"
        )
    for name, value in stored.items():
        own[name].copy_(value)


def _stored_name(name: str) -> str:
    """Name that an adapter's weight has in a file; the live one says which of several adapters it belongs to."""
    return name.replace(".modules_to_save.", ".").replace(".default.", ".")


def _some(names: list[Any]) -> str:
    return f"{len(names)} weights ({', '.join(sorted(names)[:2])}, ...)" if names else "none"
