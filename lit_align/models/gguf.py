"""GGUF files, the one-file format of llama.cpp: read into plain dense weights, which can be trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
"""Where the file says which token has which part."""


def gguf_options(gguf_file: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`.

    Dequantising is asked for by name: left to itself transformers keeps the blocks packed wherever it finds a
    kernel for them, and packed blocks can be neither trained nor saved.
    """
    return {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Gives the special tokens the parts that the file gives them.

    transformers up to 5.17 exchanges begin and end of text, after which no answer would ever end.
    """
    fields = GGUFReader(file).fields
    for part, key in SPECIAL_TOKENS.items():
        if key in fields:
            setattr(tokenizer, part, tokenizer.convert_ids_to_tokens(int(fields[key].contents())))


def forget_gguf(model: PreTrainedModel) -> None:
    """Drops the names that lead back to the GGUF file: nothing else could be loaded from there."""
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path  # what the file calls itself
    model.config._name_or_path = ""
