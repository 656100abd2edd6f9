"""What the data modules are told about the model: its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

# Under one of these names a stage says where its main network comes from.
ROLES = ("policy", "reward_model")


def hand_over_tokenizer(config: Namespace) -> None:
    """Fills `tokenizer` of data modules that leave it open with the model's, in place; one that is given stays.

    Args:
        config: A command's parsed configuration: `model`, `data`, `trainer`.
    """
    tokenizer = _tokenizer_of(config.get("model"))
    if tokenizer is None:
        return
    trainer = config.get("trainer") or Namespace()
    for init_args in _init_args((config.get("data"), trainer.get("callbacks"))):
        if "tokenizer" in init_args and init_args.get("tokenizer") is None:
            init_args["tokenizer"] = tokenizer


def _tokenizer_of(model: Any) -> str | None:
    init_args = model.get("init_args") if isinstance(model, Namespace) else None
    for role in ROLES:
        source = init_args.get(role) if init_args else None
        if source is not None:
            return source.get("tokenizer") or _place(source)
    return None


def _place(source: Namespace) -> str | None:
    path, gguf_file, revision = source.get("path"), source.get("gguf_file"), source.get("revision")
    if path and gguf_file:
        return str(Path(path) / gguf_file)
    return f"{path}@{revision}" if path and revision and not Path(path).exists() else path


def _init_args(node: Any) -> Iterator[Namespace]:
    """Constructor arguments of every class in a part of the configuration."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _init_args(item)
    elif isinstance(node, Namespace) and isinstance(node.get("class_path"), str):
        init_args = node.get("init_args")
        if isinstance(init_args, Namespace):
            yield init_args
            yield from _init_args(list(init_args.values(branches=True)))
