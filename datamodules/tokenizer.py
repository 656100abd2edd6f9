"""Loading a tokenizer, with errors that say what to give."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: Any, owner: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, an id (`org/name`, `org/name@revision`) or a GGUF file; an object is handed back.

    Args:
        source: What was configured.
        owner: Who asks, for the error message.

    Raises:
        ValueError: Nothing was configured, or it cannot be loaded, or it is no fast tokenizer.
    """
    if source is None:
        raise ValueError(
            f"{owner}: no tokenizer; give data.tokenizer = a folder or an id (the command line takes the model's when "
            "the model has a path; in code it is the argument tokenizer)"
        )
    tokenizer = source if hasattr(source, "apply_chat_template") else _from_path(str(source))
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {str(source)!r}: a fast tokenizer (tokenizer.json) is needed, for labels are found by offsets"
        )
    return tokenizer


def _from_path(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    options, place = {}, str(path) if path.exists() else source
    if path.suffix == ".gguf":
        options["gguf_file"], place = path.name, str(path.parent)
    elif "@" in source and not path.exists():  # in no id of the Hub
        place, _, options["revision"] = source.rpartition("@")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        where = "" if path.exists() else " (no such folder; it was tried as a Hugging Face id)"
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"tokenizer {source!r}: it cannot be loaded{where}; expected a folder with a tokenizer.json, a GGUF file "
            f"or the id of a model ({first})"
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the vocabulary, its rules and the chat template."""
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [backend, str(tokenizer.chat_template), str(tokenizer.eos_token), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
