"""What a checkpoint says of its networks, so that they can be built again from the checkpoint alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lit_align.models.adapters import plain_name
from lit_align.models.fingerprint import base_fingerprint
from lit_align.models.load import load_causal_lm, load_scalar_model, prepare
from lit_align.models.modes import base_model, dropout_settings, has_adapters
from lit_align.models.scalar import HEAD, install_head
from lit_align.models.source import ModelSource
from lit_align.models.unpickling import nothing_executed
from lit_align.sharded_checkpoint import META, read_whole

if TYPE_CHECKING:
    from peft import PeftModel

ENTRY = "lit_align"
AUTO = {"causal": AutoModelForCausalLM, "scalar": AutoModelForSequenceClassification}


def checkpoint_entry(
    stage: str,
    roles: Mapping[str, tuple[ModelSource, nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    fingerprints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What goes into `checkpoint["lit_align"]`: plain types and tensors, so that `weights_only=True` reads it.

    Args:
        stage: Name of the stage ("dpo", ...).
        roles: For each role that the state dict holds ("policy", "critic", ...): its source and its model.
        tokenizer: As it was used, template included; its files go into the entry.
        fingerprints: "reference" -> the fingerprint that anchors it; "<role>.base" -> the `base_fingerprint` of a
            role with adapters, which is compared when the base is read anew.
    """
    return {
        "stage": stage,
        "roles": {role: describe(source, model) for role, (source, model) in roles.items()},
        "fingerprints": dict(fingerprints or {}),
        "tokenizer": tokenizer_files(tokenizer),
    }


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry and the state dict of a checkpoint; nothing pickled in it is executed.

    A folder, which a sharded run wrote, is read as one.

    Raises:
        ValueError: When there is nothing, nothing that a stage of this library wrote, or something to execute.
    """
    if (Path(path) / META).is_file():
        with nothing_executed(Path(path) / META):
            checkpoint = read_whole(Path(path), optimizers=False)
    elif Path(path).is_file():
        with nothing_executed(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    else:
        kind = "a folder that no sharded run wrote" if Path(path).is_dir() else "nothing"
        raise ValueError(f"checkpoint: expected a .ckpt file; {path} is {kind}")
    if ENTRY not in checkpoint:
        raise ValueError(f"{path}: no stage of lit_align wrote this checkpoint (it has no entry {ENTRY!r})")
    return checkpoint[ENTRY], checkpoint["state_dict"]


def whole_copy(source: ModelSource, model: nn.Module) -> PreTrainedModel | PeftModel | None:
    """A sharded network as a whole one on the CPU; all ranks have to call it.

    Returns:
        The copy on rank 0, None on all others.
    """
    first, state = distributed.get_rank() == 0, {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # one at a time
        if first:
            state[f"copy.{name}"] = whole.detach().cpu().clone()
    if not first:
        return None
    entry = {"roles": {"copy": describe(source, model)}, "fingerprints": {}}
    return rebuild(entry, state, "copy", source.trust_remote_code)  # code that the user trusted, and that runs already


def rebuild(
    entry: dict[str, Any], state: Mapping[str, Tensor], role: str, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """The model of one role, with exactly the weights of the checkpoint.

    A checkpoint with all weights needs nothing else. One that holds adapters alone needs the base, which is read
    from where it was read first.

    Args:
        entry: As `read_checkpoint` returned it.
        state: The checkpoint's state dict; the role's keys start with "<role>.".
        role: Which model.
        trust_remote_code: Run Python code that comes with the model, if it was trained with such code. The
            checkpoint's own word for it does not count.

    Raises:
        ValueError: When the role is not there, weights are missing or left over, the base is another one, or code
            would have to run that nobody has trusted.
    """
    if role not in entry["roles"]:
        raise ValueError(f"role: expected one of {', '.join(entry['roles'])}; got {role!r}")
    described = entry["roles"][role]
    own = {key.removeprefix(f"{role}."): value for key, value in state.items() if key.startswith(f"{role}.")}
    source = ModelSource.from_dict(described["source"])
    if source.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"{role}: it was trained with Python code that comes with {source.path!r}, and building it runs that code; "
            "pass trust_remote_code=true if you have read it"
        )
    if whole := source.lora is None or any(plain_name(key) for key in own):
        model = _build(described, source)
    else:
        model = {"causal": load_causal_lm, "scalar": load_scalar_model}[described["kind"]](source, role)
        own = _with_base(model, own, entry["fingerprints"].get(f"{role}.base"), role)
    # All of its weights take the place of what was made for them and never written to: no second copy in memory.
    missing, unexpected = model.load_state_dict(own, strict=False, assign=whole)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit its own description of {role!r}: {len(missing)} weights missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} left over ({', '.join(unexpected[:3])})"
        )
    base_model(model).tie_weights()
    return model


def restore_tokenizer(entry: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer as it was used in training; Python code among its files is not run.

    Raises:
        ValueError: A file would lie outside the tokenizer's folder, or the tokenizer needs code of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in entry["tokenizer"].items():
            if Path(name).name != name or name == "..":
                raise ValueError(f"the checkpoint's tokenizer has a file {name!r}; expected a name without a folder")
            (Path(folder) / name).write_bytes(content.numpy().tobytes())
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def plain_config(model: Any) -> PreTrainedConfig:
    """A copy of the model's configuration without what training set: caching and dropout are as they were."""
    config = deepcopy(model.config)
    text_config = config.get_text_config()
    text_config.use_cache = True
    for key, value in dropout_settings(model).items():
        setattr(text_config, key, value)
    config._attn_implementation = None
    return config


def is_scalar(model: nn.Module) -> bool:
    """Whether the model ends in a scalar head rather than in a vocabulary."""
    return hasattr(model.get_base_model() if has_adapters(model) else model, HEAD)


def describe(source: ModelSource, model: nn.Module) -> dict[str, Any]:
    """What a role is: where it comes from, its kind, its configuration; plain types."""
    return {
        "source": source.to_dict(),
        "kind": "scalar" if is_scalar(model) else "causal",
        "config": json.loads(plain_config(model).to_json_string(use_diff=False)),
    }


def _build(described: dict[str, Any], source: ModelSource) -> PreTrainedModel | PeftModel:
    trust = source.trust_remote_code
    if trust and source.path:
        config = AutoConfig.from_pretrained(source.path, revision=source.revision or "main", trust_remote_code=True)
    else:
        config = AutoConfig.for_model(**described["config"])
    with no_init_weights():
        model = AUTO[described["kind"]].from_config(config, dtype=source.torch_dtype, trust_remote_code=trust)
    model.tie_weights()
    if described["kind"] == "scalar":
        install_head(model, fresh=False)
    return prepare(model, source, described["kind"])


def _with_base(model: nn.Module, adapters: dict[str, Tensor], expected: str | None, role: str) -> dict[str, Tensor]:
    if expected is not None and (found := base_fingerprint(model)) != expected:
        raise ValueError(f"{role}: the base has changed since training: fingerprint {found}, expected {expected}")
    return {key: value for key, value in model.state_dict().items() if plain_name(key)} | adapters


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The files that the tokenizer is saved as, by name; their bytes, uint8."""
    with tempfile.TemporaryDirectory() as folder, _at_rest(tokenizer):
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return {path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files}


@contextmanager
def _at_rest(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Without the padding and truncation that the last call left in the tokenizer, and that its files would hold."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
