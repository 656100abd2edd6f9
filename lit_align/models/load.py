"""Networks from their sources: causal language models (policies) and scalar models (reward models, critics)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lit_align.models.adapter_folder import read_adapters
from lit_align.models.adapters import add_adapters
from lit_align.models.attention import PACKED
from lit_align.models.compiling import compile_layers
from lit_align.models.packable import is_packable
from lit_align.models.pretrained import read_pretrained, refuse_missing
from lit_align.models.scalar import HEAD, align_padding, install_head
from lit_align.models.scratch import fresh_config
from lit_align.models.sharding import shard
from lit_align.models.slices import hide_slices
from lit_align.models.source import ModelSource
from lit_align.models.tokens import load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


def load_causal_lm(source: ModelSource, name: str = "model") -> PreTrainedModel | PeftModel:
    """Builds a causal language model, in training mode and with caching off (`generate` still caches).

    Args:
        source: Where it comes from.
        name: What the user calls the source ("policy", ...); it starts error messages.

    Returns:
        The model on the CPU, all weights trainable; with `source.lora`, adapters on frozen weights.

    Raises:
        ValueError: When the source cannot be read, or does not hold every weight of the model.
    """
    source.validate(name)
    if source.config is not None:
        config = fresh_config(source.config, load_tokenizer(source, name), name)
        model = AutoModelForCausalLM.from_config(config, dtype=source.torch_dtype)
    else:
        model, missing = read_pretrained(AutoModelForCausalLM, source, name)
        refuse_missing(missing, source, name)
    return prepare(model, source, "causal")


def load_scalar_model(source: ModelSource, name: str = "model") -> PreTrainedModel | PeftModel:
    """Builds a model with one number per position, in training mode and with caching off.

    It starts from a causal language model, whose trunk it takes under a fresh head, or from a folder that an
    earlier reward model or critic was exported to. See `scalar` for the head and the padding token.

    Args:
        source: Where it comes from.
        name: What the user calls the source ("reward_model", ...); it starts error messages.

    Returns:
        A `...ForSequenceClassification` with one label; with `source.lora`, adapters and the head are trained.

    Raises:
        ValueError: When the source cannot be read, does not hold every weight of the trunk, or has no scalar form.
    """
    source.validate(name)
    tokenizer = load_tokenizer(source, name)
    if source.config is not None:
        config = fresh_config(source.config, tokenizer, name, num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config, dtype=source.torch_dtype)
        missing = {f"{HEAD}.weight"}
    else:
        model, missing = read_pretrained(AutoModelForSequenceClassification, source, name, num_labels=1)
        refuse_missing({key for key in missing if not key.startswith(f"{HEAD}.")}, source, name)
    install_head(model, fresh=bool(missing))
    align_padding(model, tokenizer)
    return prepare(model, source, "scalar")


def prepare(
    model: PreTrainedModel, source: ModelSource, kind: str, start: str | None = None
) -> PreTrainedModel | PeftModel:
    """Readies a freshly built model for training as its source says, and shards it if networks are to be sharded.

    Args:
        model: With all its weights; it is changed in place.
        source: Whose attention, activation checkpointing, compilation and adapters it gets.
        kind: "causal" or "scalar".
        start: Folder of the adapters that its own begin as; None = they change nothing yet.
    """
    set_attention(model, source.attention)
    model.config.get_text_config().use_cache = False
    if model.can_generate():
        model.generation_config.use_cache = True
    if source.gradient_checkpointing:
        # The second name is the one that transformers before 5.18 knows.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if source.compile:
        compile_layers(model)
    slices = hide_slices(model)
    adapted = model if source.lora is None else add_adapters(model, source.lora, kind)
    if start is not None:
        read_adapters(adapted, start)
    shard(model, slices)  # with its adapters: a layer is one group
    return adapted.train()


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Sets the attention; "packed" only where it computes the same as the architecture's own (see `packable`).

    Other models keep their own attention, and `hidden_states` pads packed batches for them.
    """
    if attention != PACKED or is_packable(model):
        model.set_attn_implementation(attention)
