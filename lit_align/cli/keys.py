"""What a configuration may contain: names that a class accepts, where a key stands in a file, the closest name."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

_WRAPPERS = ("init_args", "dict_kwargs")


def options_of(kind: Any) -> list[str]:
    """Names that a class (or dataclass, or the classes of a union) takes in its constructor."""
    return [name for member in _members(kind) for constructor in _constructors(member) for name in _own(constructor)]


def type_of(kind: Any, option: str) -> Any:
    """Declared type of a constructor argument; None where it cannot be told."""
    for member in _members(kind):
        for constructor in _constructors(member):
            if option in _own(constructor):
                try:
                    return typing.get_type_hints(constructor).get(option)
                except NameError:  # names imported for type checkers alone
                    return None
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)


def _constructors(kind: Any) -> Iterator[Any]:
    """The class's constructor, and, as far as `**kwargs` are handed on, those of its parents."""
    for parent in getattr(kind, "__mro__", ()):
        constructor = vars(parent).get("__init__")
        if not inspect.isfunction(constructor):
            continue
        yield constructor
        if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
            return


def _own(constructor: Any) -> list[str]:
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def class_at(path: str) -> type | None:
    """The class of an import path, if its module is there."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def class_names(packages: Iterable[str]) -> list[str]:
    """Names of the public classes that the imported modules of these packages define."""
    tops = set(packages)
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in tops and module]
    return sorted(
        {
            name
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, type) and not name.startswith("_") and value.__module__.split(".")[0] in tops
        }
    )


def closest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of the names, if one is similar at all."""
    by_lower = {n.lower(): n for n in names}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return by_lower[found[0]] if found else None


def config_files(args: Sequence[str]) -> list[Path]:
    """Files given with --config or -c, in order."""
    files = []
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c"):
            files += [Path(value)] if equals else [Path(v) for v in args[i + 1 : i + 2]]
    return files


def line_of(key: str, file: Path) -> int | None:
    """Line of a dotted key in a YAML file, from 1; None if it is not there. `init_args` levels may be left out."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return _find(root, [part for part in key.split(".") if part not in _WRAPPERS])


def where_of(key: str, args: Sequence[str]) -> str | None:
    """Where the user wrote a key: "the command line" or "file:line"; None if it cannot be told.

    The command line overrides files, and later files override earlier ones, so that is where it looks first.
    """
    wanted = _short(key)
    given = (_short(arg.partition("=")[0].removeprefix("--")) for arg in args if arg.startswith("--"))
    if any(f"{name}.".startswith(f"{wanted}.") for name in given):
        return "the command line"
    for file in reversed(config_files(args)):
        if line := line_of(key, file):
            return f"{file}:{line}"
    return None


def _short(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _find(node: Any, keys: list[str]) -> int | None:
    if isinstance(node, yaml.SequenceNode):
        return next((line for item in node.value if (line := _find(item, keys))), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value in _WRAPPERS:
            line = _find(value, keys)
        elif name.value.rstrip("+") == keys[0]:
            line = name.start_mark.line + 1 if len(keys) == 1 else _find(value, keys[1:])
        else:
            continue
        if line:
            return line
    return None
