"""Configurations of fresh models: what the user wrote, completed from the tokenizer, with unknown keys refused."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lit_align.models.tokens import first_line

OLDER_NAMES = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"}
"""Keys of older configuration files, which transformers still understands."""


def fresh_config(
    values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str = "model", **forced: Any
) -> PreTrainedConfig:
    """The configuration of a model that starts from random weights.

    Args:
        values: `model_type` and that type's own keys, as in a model's config.json.
        tokenizer: Gives `vocab_size` and the ids of the special tokens where `values` leaves them open.
        name: What the user calls the source ("policy", ...); it starts the messages.
        **forced: Keys set whatever the user wrote.

    Raises:
        ValueError: For a type or key that does not exist, a vocabulary smaller than the tokenizer's, and whatever
            the type itself refuses.
    """
    values = dict(values)
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{name}.config.model_type: no such type {model_type!r}{_hint(model_type, CONFIG_MAPPING)}")
    known = _keys(CONFIG_MAPPING[model_type])
    for key in values:
        if key not in known:
            raise ValueError(f"{name}.config: {model_type} has no key {key!r}{_hint(key, known)}")
    vocab_size = values.setdefault("vocab_size", len(tokenizer))
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"{name}.config.vocab_size: expected at least the tokenizer's {len(tokenizer)}; got {vocab_size}. "
            "Leave it out to take the tokenizer's."
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(key, getattr(tokenizer, key))
    try:
        return AutoConfig.for_model(model_type, **values, **forced)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or first_line(error)
        raise ValueError(f"{name}.config: {reason}") from error


def _keys(config_class: type[PreTrainedConfig]) -> set[str]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    return fields | set(config_class.attribute_map) | OLDER_NAMES


def _hint(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
