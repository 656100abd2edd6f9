"""Whether a checkpoint is one of these networks; if not, the difference is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.models.checkpoint import describe, tokenizer_files
from lit_align.models.source import ModelSource

UNIMPORTANT = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Entries of a configuration that do not change what the network computes (its dtype is compared by its source)."""


def check_same_networks(
    entry: Mapping[str, Any],
    stage: str,
    roles: Mapping[str, tuple[ModelSource, nn.Module]],
    tokenizer: PreTrainedTokenizerBase | None,
    fingerprints: Mapping[str, str],
) -> None:
    """Refuses a checkpoint of another stage, of networks of another shape, or with other frozen networks.

    Trained weights may come from anywhere: the checkpoint's replace them.

    Args:
        entry: What the checkpoint says of itself, as `checkpoint_entry` made it; empty = nothing is compared.
        stage: Name of the stage.
        roles: Source and network of each trained role.
        tokenizer: The stage's.
        fingerprints: Of the frozen networks, by name.

    Raises:
        ValueError: Names every difference.
    """
    if not entry:
        return
    found = list(_differences(entry, stage, roles, tokenizer))
    stored = entry.get("fingerprints", {})
    found += [
        f"{name}: only {'the checkpoint' if name in stored else 'this run'} has one"
        for name in sorted(stored.keys() ^ fingerprints.keys())
        if not name.endswith(".base")  # that of adapters, which are compared themselves
    ]
    found += [
        f"{name}: its weights are not those that the checkpoint's run was using (fingerprint {now[:12]}, expected "
        f"{stored[name][:12]}); restore the files that it is loaded from"
        for name, now in fingerprints.items()
        if name in stored and stored[name] != now
    ]
    if found:
        raise ValueError("the checkpoint is not one of this run's networks: " + "; ".join(found))


def _differences(
    entry: Mapping[str, Any],
    stage: str,
    roles: Mapping[str, tuple[ModelSource, nn.Module]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[str]:
    if entry["stage"] != stage:
        yield f"it is of stage {entry['stage']}, this is {stage}"
        return
    stored = entry["roles"]
    for name in sorted(stored.keys() ^ roles.keys()):
        yield f"{name}: only {'the checkpoint' if name in stored else 'this run'} has one"
    for name in sorted(stored.keys() & roles.keys()):
        now = describe(*roles[name])
        yield from _between(f"{name}.config.", stored[name]["config"], now["config"], UNIMPORTANT)
        important = ("dtype", "lora", "quantization")  # the last one is not in older checkpoints
        before, after = ({key: d["source"].get(key) for key in important} for d in (stored[name], now))
        yield from _between(f"{name}.", before, after)
    if tokenizer is not None:
        files = tokenizer_files(tokenizer)
        if changed := [name for name, content in files.items() if not _same(entry["tokenizer"].get(name), content)]:
            of_data = " (chat templates are those of data.tokenizer)" if "chat_template.jinja" in changed else ""
            yield f"the tokenizer differs in {', '.join(changed)}{of_data}"


def _between(
    prefix: str, stored: Mapping[str, Any], now: Mapping[str, Any], skipped: tuple[str, ...] = ()
) -> Iterator[str]:
    """What differs in the settings that both have: another version of a library may know more of them."""
    for key in sorted(stored.keys() & now.keys() - set(skipped)):
        if isinstance(stored[key], Mapping) and isinstance(now[key], Mapping):
            yield from _between(f"{prefix}{key}.", stored[key], now[key], skipped)
        elif stored[key] != now[key]:
            yield f"{prefix}{key}: it was {stored[key]}, now it is {now[key]}"


def _same(stored: Tensor | None, now: Tensor) -> bool:
    return stored is not None and bytes(stored.numpy()) == bytes(now.numpy())
