"""Networks without weights, on the meta device: shapes, data types, what is trained; only configurations are read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from lit_align.models.adapters import is_adapter_folder
from lit_align.models.load import prepare
from lit_align.models.quantization import quantize_shapes
from lit_align.models.quiet import quiet_loading
from lit_align.models.scalar import install_head
from lit_align.models.scratch import fresh_config
from lit_align.models.source import ModelSource
from lit_align.models.tokens import first_line, load_tokenizer


def meta_network(source: ModelSource, kind: str, name: str = "model") -> nn.Module:
    """The network that `load_causal_lm` or `load_scalar_model` would build, on the meta device.

    Args:
        source: Where it comes from; its configuration is read, and the tokenizer of one from scratch.
        kind: "causal" or "scalar".
        name: What the user calls the source; it starts error messages.

    Raises:
        ValueError: There is no configuration, or the architecture has no such form.
    """
    source.validate(name)
    config = _config(source, name)
    # A model's own code runs where that was asked for, and else nobody is asked again.
    options = {"dtype": source.torch_dtype, "trust_remote_code": source.trust_remote_code}
    with torch.device("meta"), quiet_loading():
        if kind == "scalar":
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config, **options)
            install_head(model, fresh=True)
        else:
            model = AutoModelForCausalLM.from_config(config, **options)
        if source.quantization:
            quantize_shapes(model, source.quantization)
        return prepare(model, source, kind)


def _config(source: ModelSource, name: str) -> PreTrainedConfig:
    if source.config is not None:
        return fresh_config(source.config, load_tokenizer(source, name), name)
    folder, gguf_file = source.location
    revision = source.revision
    if is_adapter_folder(folder):
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(str(folder))
        folder, revision = adapter.base_model_name_or_path, adapter.revision
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoConfig.from_pretrained(
            folder, revision=revision or "main", trust_remote_code=source.trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}.path: cannot read a configuration of {source.path!r}: {first_line(error)}") from error
