"""How the roles of PPO are held: each with weights of its own, or all on the frozen base under the policy's adapters.

On one trunk every role is still a network of its own modules, with its own adapters, head and modes; what the networks
have in common are the base's parameters, which lie in memory once. So nothing is ever switched from one role to
another: no adapter is active in a pass that is not its own, also where a layer is computed again in the backward pass,
and gradients, dropout, compiled layers and shards are those of separate networks.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lit_align.models.adapter_folder import adapter_settings, base_of
from lit_align.models.adapters import is_adapter_folder, is_tuner_layer
from lit_align.models.checkpoint import plain_config
from lit_align.models.layers import is_plain_linear
from lit_align.models.load import load_scalar_model, prepare
from lit_align.models.modes import base_model
from lit_align.models.scalar import HEAD, install_head
from lit_align.models.source import ModelSource
from lit_align.models.tokens import load_tokenizer, separate_pad_token

if TYPE_CHECKING:
    from peft import PeftModel


class OwnWeights:
    """Each role has all of its weights to itself, and may come from anywhere."""

    shared = False

    def source_of(self, source: ModelSource, name: str) -> ModelSource:
        """The source itself."""
        return source

    def scalar_model(self, policy: nn.Module, source: ModelSource, name: str) -> PreTrainedModel | PeftModel:
        """See `load_scalar_model`."""
        return load_scalar_model(source, name)


class SharedTrunk:
    """Critic and reward model lie on the policy's base, under adapters and a head of their own.

    A role's source says what these begin as: an adapter folder whose base is the policy's, or the policy's own
    `path` with `lora`, for adapters that change nothing yet under a head of zeros.

    Args:
        policy: Where the policy comes from.

    Raises:
        ValueError: The policy has no adapters, so its base is trained.
    """

    shared = True

    def __init__(self, policy: ModelSource) -> None:
        if policy.lora is None:
            raise ValueError(
                "shared_trunk: the networks share a base that is not trained; set policy.lora ({r: 16, alpha: 32}, "
                "say), or shared_trunk: false"
            )
        self.policy = policy
        self._made: dict[str, ModelSource] = {}

    def source_of(self, source: ModelSource, name: str) -> ModelSource:
        """What a role on the trunk is: the policy's base under adapters like these. No weight is read.

        What it is does not change in a run, so the folder is looked into once.

        Args:
            source: What its adapters begin as.
            name: What the user calls it ("critic", ...); it starts error messages.

        Raises:
            ValueError: It does not lie on the policy's base.
        """
        if name not in self._made:
            self._made[name] = self._on_base(source, name)
        return self._made[name]

    def _on_base(self, source: ModelSource, name: str) -> ModelSource:
        start = self._start(source)
        if start is not None:
            self._check_base(start, name)
            lora = adapter_settings(start, name)
            if source.lora not in (None, lora):
                raise ValueError(f"{name}.lora: the adapters in {start!r} are {lora}, got {source.lora}; leave it out")
        elif source.lora is not None and _origin(source) == _origin(self.policy):
            lora = source.lora
        else:
            raise ValueError(
                f"{name}: with shared_trunk expected a folder of adapters on the policy's base (LitReward with lora, "
                "exported with for_trunk=true), or the policy's own path with lora for fresh adapters; got path "
                f"{source.path!r} {'without' if source.lora is None else 'with'} lora. reward_model: null leaves the "
                "rewards to reward_functions; with shared_trunk: false each network has its own weights"
            )
        if source.dtype != self.policy.dtype:
            raise ValueError(f"{name}.dtype: the policy's base is in {self.policy.dtype}, got {source.dtype}")
        if source.quantization not in (None, self.policy.quantization):
            ours = f"in {self.policy.quantization}" if self.policy.quantization else "not quantised"
            raise ValueError(f"{name}.quantization: the policy's base is {ours}; leave {source.quantization} out")
        own = {key: getattr(source, key) for key in ("gradient_checkpointing", "compile", "attention")}
        return replace(self.policy, lora=lora, **own).validate(name)

    def scalar_model(self, policy: nn.Module, source: ModelSource, name: str) -> PeftModel:
        """A network with one number per position on the policy's base; all of it is trainable that is not the base.

        Args:
            policy: As `load_causal_lm` returned it just now; it is not changed.
            source: See `source_of`.
            name: See `source_of`.

        Raises:
            ValueError: It does not lie on the policy's base, the adapters do not fit, or there is no scalar form.
        """
        made = self.source_of(source, name)
        model = _empty_scalar_model(_scalar_config(policy, made, name), made)
        _share(base_model(policy).base_model, model.base_model)
        if left := [key for key, value in _tensors(model) if value.is_meta]:
            raise ValueError(
                f"{name}: {type(model).__name__} has weights that {type(base_model(policy)).__name__} lacks "
                f"({left[0]}, ...); set shared_trunk: false"
            )
        return prepare(model, made, "scalar", self._start(source))  # type: ignore[return-value]

    def _start(self, source: ModelSource) -> str | None:
        """The adapter folder that a role begins as; None = fresh adapters."""
        folder = source.location[0]
        fresh = source.lora is not None and _origin(source) == _origin(self.policy)
        return folder if is_adapter_folder(folder) and not fresh else None

    def _check_base(self, folder: str, name: str) -> None:
        base, revision = base_of(folder)
        ours = self.policy.location[0] or ""
        if self.policy.location[1] or not _is_same_place((base, revision), (ours, self.policy.revision)):
            raise ValueError(
                f"{name}.path: the adapters in {folder!r} were trained on {base or 'an unknown base'!r}, and the "
                f"policy's base is {ours or 'a model from scratch'!r}; train them on that, or set shared_trunk: false"
            )


def _origin(source: ModelSource) -> tuple[Any, ...]:
    return source.location, source.revision, source.config


def _is_same_place(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    if Path(one[0]).is_dir() and Path(other[0]).is_dir():
        return Path(one[0]).samefile(other[0])
    return one[0] == other[0] and (one[1] or "main") == (other[1] or "main")


def _scalar_config(policy: nn.Module, source: ModelSource, name: str) -> PreTrainedConfig:
    config = plain_config(base_model(policy))
    config.num_labels = 1
    pad_token_id = separate_pad_token(load_tokenizer(source, name))
    if pad_token_id >= config.get_text_config().vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has no token left for padding, so a scalar model has one embedding more than the "
            "policy's base; name one of its tokens in the tokenizer's pad_token, or set shared_trunk: false"
        )
    config.get_text_config().pad_token_id = pad_token_id
    return config


def _empty_scalar_model(config: PreTrainedConfig, source: ModelSource) -> PreTrainedModel:
    """On the meta device, but for a head of zeros."""
    trust = source.trust_remote_code
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=source.torch_dtype, trust_remote_code=trust
        )
    head = getattr(model, HEAD, None)
    if head is not None:
        head.to_empty(device="cpu")
    install_head(model, fresh=True)
    return model


def _share(owner: nn.Module, model: nn.Module) -> None:
    """Puts parameters and buffers of one trunk into another of the same architecture; adapters are left out."""
    for name, module in owner.named_modules():
        if is_tuner_layer(module) or ".lora_" in name:
            continue
        name = name.replace(".base_layer", "")
        if isinstance(module, nn.Linear) and not is_plain_linear(module):
            model.set_submodule(name, _same_weights(module))
            continue
        place = model.get_submodule(name)
        for key, value in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            setattr(place, key, value)


def _same_weights(module: nn.Module) -> nn.Module:
    """A module of its own with the same parameters; for quantised ones, which say more of them than their tensors."""
    other = copy(module)
    vars(other).update({key: copy(value) for key, value in vars(other).items() if isinstance(value, dict)})
    return other


def _tensors(model: nn.Module) -> Any:
    return chain(model.named_parameters(), model.named_buffers())
