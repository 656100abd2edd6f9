"""Weights that exist: reading a Hugging Face id or folder, a GGUF file, an adapter with its base."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from logging import getLogger
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from lit_align.models.adapters import is_adapter_folder, is_tuner_layer, merge_adapter_folder, modules_saved_whole
from lit_align.models.gguf import forget_gguf, gguf_options
from lit_align.models.quantization import adopt, quantizing_options, refuse_shards, tell_share
from lit_align.models.quiet import quiet_loading
from lit_align.models.scalar import HEAD, head_in_float32, install_head
from lit_align.models.sharding import current_sharding
from lit_align.models.slices import of_all_ranks, reading_slices
from lit_align.models.source import ModelSource
from lit_align.models.tokens import first_line
from lit_align.models.unpickling import nothing_executed

log = getLogger(__name__)

HEADS = (f"{HEAD}.", "lm_head.")
"""Weights that may be left over: a scalar model has no use for a language model's head, nor the other way round."""


def read_pretrained(
    auto_class: Any, source: ModelSource, name: str = "model", whole: bool = False, **extra: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model that `source.path` holds; an adapter comes folded into its base.

    Where networks are to be sharded each rank reads its slices alone; a GGUF file, and an adapter with its base, are
    read whole by every rank.

    Pickled weights are read with `weights_only=True`, as transformers does by itself.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        source: Whose path, revision, dtype and trust count.
        name: What the user calls the source; it starts the messages.
        whole: Read whole weights in any case.
        **extra: For the configuration (`num_labels`).

    Returns:
        The model, and the names of those of its weights that were not there and are random now.

    Raises:
        ValueError: When nothing can be loaded from there, or a weight has another shape.
    """
    if source.quantization is not None:
        extra |= _quantizing(source, name)
    if is_adapter_folder(source.location[0]):
        with nothing_executed(source.path):
            return _read_adapter(auto_class, source, name, **extra)
    try:
        with nothing_executed(source.path):
            model, report = _from_pretrained(auto_class, source, whole, **extra)
    except (OSError, ValueError) as error:
        where = "" if Path(str(source.path)).exists() else " (no such folder; it was tried as a Hugging Face id)"
        raise ValueError(f"{name}.path: cannot load {source.path!r}{where}: {first_line(error)}") from error
    if source.quantization is not None:
        adopt(model, source.quantization)
        tell_share(model, name)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{name}.path: the weights in {source.path!r} are quantised already ({model.quantization_method}), and can "
            "be neither trained nor exported; give the model that they were made of, with "
            f"{name}.quantization: nf4 or int8 for a frozen base in few bits"
        )
    if any(is_tuner_layer(module) for module in model.modules()):
        raise ValueError(f"{name}.path: {source.path!r} holds an adapter; download it to a folder, or merge it first")
    for key, stored, expected in sorted(report["mismatched_keys"]):
        part = "" if whole or current_sharding() is None else " (the rows of one rank)"
        raise ValueError(
            f"{name}.path: {key} in {source.path!r} has shape {tuple(stored)}; "
            f"{type(model).__name__} expects {tuple(expected)}{part}"
        )
    if unexpected := [key for key in report["unexpected_keys"] if not key.startswith(HEADS)]:
        some = ", ".join(sorted(unexpected)[:3])
        log.warning("%s.path: %s weights of %s were not used (%s, ...)", name, len(unexpected), source.path, some)
    return model, set(report["missing_keys"])


def refuse_missing(missing: set[str], source: ModelSource, name: str = "model") -> None:
    """Raises ValueError when weights are missing: transformers has put random ones in their place."""
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{name}.path: {source.path!r} lacks {len(missing)} weights of the model ({some}, ...)")


def _quantizing(source: ModelSource, name: str) -> dict[str, Any]:
    """Arguments for `from_pretrained` that make it quantise; refuses what does not go with them."""
    if current_sharding() is not None:
        refuse_shards(name)
    if is_adapter_folder(source.location[0]):
        raise ValueError(
            f"{name}.quantization: {source.path!r} holds an adapter, which is folded into its base at full precision; "
            "write the whole model to a folder (export with merge_lora=true) and give that as path"
        )
    try:
        config = AutoConfig.from_pretrained(
            str(source.path), revision=source.revision or "main", trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError):
        config = None  # whoever reads the weights says what is wrong
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name}.quantization: the weights in {source.path!r} are quantised already; give the model that they were "
            "made of"
        )
    return quantizing_options(str(source.quantization), name)


def _from_pretrained(
    auto_class: Any, source: ModelSource, whole: bool, **extra: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    folder, gguf_file = source.location
    assert folder is not None, "validate() was called"
    options = {"revision": source.revision or "main", "trust_remote_code": source.trust_remote_code, **extra}
    options |= gguf_options(gguf_file) if gguf_file else {}
    head = nullcontext() if gguf_file else _head_in_float32(auto_class, folder, options)
    slices = None if whole or gguf_file else current_sharding()
    with quiet_loading(), head, reading_slices(slices.mesh) if slices else nullcontext({}) as sliced:
        model, report = auto_class.from_pretrained(
            folder,
            dtype=source.torch_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **sliced,
        )
    if sliced:  # a weight of another shape need not be seen in every rank's slice of it
        report["mismatched_keys"] = of_all_ranks(report["mismatched_keys"])
    if gguf_file:
        forget_gguf(model)
    return model, report


def _head_in_float32(auto_class: Any, folder: str, options: dict[str, Any]) -> AbstractContextManager[None]:
    if auto_class is not AutoModelForSequenceClassification:
        return nullcontext()
    config = AutoConfig.from_pretrained(
        folder, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
    )
    classes: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return head_in_float32(classes[type(config)]) if type(config) in classes else nullcontext()


def _read_adapter(auto_class: Any, source: ModelSource, name: str, **extra: Any) -> tuple[PreTrainedModel, set[str]]:
    missing: set[str] = set()

    def load_base(path: str, revision: str | None) -> PreTrainedModel:
        base_source = ModelSource(
            path=path, revision=revision, dtype=source.dtype, trust_remote_code=source.trust_remote_code
        )
        base, absent = read_pretrained(auto_class, base_source.validate(name), name, whole=True, **extra)
        missing.update(absent)
        if auto_class is AutoModelForSequenceClassification:
            install_head(base, fresh=False)  # in float32 before the adapter's head is written into it
        return base

    folder = str(source.path)
    model = merge_adapter_folder(folder, load_base)
    if HEAD in (modules_saved_whole(folder)):
        missing = {key for key in missing if not key.startswith(f"{HEAD}.")}
    return model, missing
