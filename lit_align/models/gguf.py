"""GGUF files, the one-file format of llama.cpp: read into plain dense weights, which can be trained and saved."""

from __future__ import annotations

from typing import Any

from transformers import GgufConfig, PreTrainedModel


def gguf_options(gguf_file: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`.

    Dequantising is asked for by name: left to itself transformers keeps the blocks packed wherever it finds a
    kernel for them, and packed blocks can be neither trained nor saved.
    """
    return {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}


def forget_gguf(model: PreTrainedModel) -> None:
    """Drops what would keep a dequantised model from being saved, or send its readers back to the GGUF file."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path  # the name that the file gives itself: no place to load from
    model.config._name_or_path = ""
