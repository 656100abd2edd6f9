"""Folders of finished models: they appear whole or not at all, and take the place of nothing but a model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

MARKS = ("config.json", "adapter_config.json")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors")
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*.jinja"),
    *("vocab*.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece*.model"),
)
WRITTEN = (*MARKS, "generation_config.json", *WEIGHTS, *TOKENIZER, "README.md")  # the last one is peft's
"""Patterns of the names that an export writes, beside Python code that comes with a model."""
TEMPLATES = "additional_chat_templates"
"""The one folder that transformers writes into a model's: templates beside the main one."""


@contextmanager
def whole_folder(out: Path, bases: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `out`, which takes the place of `out` when nothing went wrong.

    Args:
        out: See `place_for`.
        bases: See `place_for`.

    Raises:
        ValueError: When something lies at `out` that has to stay.
    """
    out = place_for(out, bases)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if place_for(out, bases).exists():  # once more: writing took its time
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def place_for(out: str | Path, bases: Iterable[str] = ()) -> Path:
    """The place of `out`, links followed, if a model may be written there.

    Args:
        out: Nothing, an empty folder, or one that holds an exported model and nothing else.
        bases: Folders or ids of models that the new one's adapters are for; empty ones count for nothing.

    Raises:
        ValueError: When something lies there that an export would not bring back; it says what.
    """
    place = Path(out).resolve()
    if place == Path.cwd():
        raise ValueError(f"out: {out} is the folder that this runs in, which cannot be replaced; name one inside it")
    if any(base and place == Path(base).resolve() for base in bases):
        raise ValueError(f"out: {out} is where the base of the adapters is read from; choose another folder")
    if not place.exists():
        return place
    if not place.is_dir():
        raise ValueError(f"out: {out} exists and is no folder; choose another place")
    if others := _others(place):
        some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(
            f"out: {out} holds {some}, and an export replaces only a folder with an exported model and nothing else; "
            "choose another folder, or move away what is in this one"
        )
    return place


def _others(folder: Path) -> list[str]:
    """What no export wrote: names, sorted; without a configuration, everything."""
    code = _code(folder)
    found = sorted(folder.iterdir())
    if not any((folder / mark).is_file() for mark in MARKS):
        return [path.name for path in found]
    return [path.name for path in found if path.name not in code and not _is_written(path)]


def _is_written(path: Path) -> bool:
    if path.name == TEMPLATES and path.is_dir():
        return all(file.suffix == ".jinja" for file in path.iterdir())
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in WRITTEN)


def _code(folder: Path) -> set[str]:
    """Python files that come with the model: those that its configurations name, and what these import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[str] = set()
    for settings in (folder / "config.json", folder / "tokenizer_config.json"):
        text = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
        named = re.search(r'"auto_map":\s*\{(.*?)\}', text, re.DOTALL)
        modules = [folder / f"{name}.py" for name in re.findall(r"(\w+)\.\w+", named[1])] if named else []
        for module in filter(Path.is_file, modules):
            found |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return found
