"""Where records come from: files, folders, globs, lists of them, and ids of the `datasets` library."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datamodules.formats.errors import DataError, Place, did_you_mean, encodable

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
HUB_KEYS = ("path", "name", "split", "revision", "data_files", "weight")

MAX_WEIGHT = 1000

BLOCK = 1 << 22
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class FileSource:
    """One local file; `weight` = how often an epoch of training sees each of its examples."""

    path: str
    weight: float = 1.0

    def fingerprint(self, whole: bool = True) -> list[str]:
        """The path, since error messages name it, and a digest of the content (or of its size, start and end)."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(self.path, "rb") as file:
                if not whole:
                    size = file.seek(0, os.SEEK_END)
                    digest.update(str(size).encode())
                    for at in (0, max(size - BLOCK, 0)):
                        file.seek(at)
                        digest.update(file.read(BLOCK))
                while whole and (block := file.read(BLOCK)):
                    digest.update(block)
        except OSError as error:
            raise unreadable(encodable(self.path), error) from None
        return [self.path, digest.hexdigest()]


@dataclass(frozen=True)
class HubSource:
    """A dataset that `datasets.load_dataset` knows; `options` are its further arguments, `weight` is as of a file."""

    path: str
    split: str = "train"
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def load(self, streaming: bool = False) -> Any:
        """The rows, downloaded at the first time, or fetched while they are read."""
        import datasets

        try:
            return datasets.load_dataset(self.path, split=self.split, streaming=streaming, **self.options)
        except Exception as error:  # the library raises a dozen unrelated types, and users need one sentence
            raise ValueError(
                f"data source {self.path!r} (split {self.split!r}): it is neither a file, a folder nor a glob that "
                f"matches something, and as an id of a dataset it cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    def fingerprint(self) -> list[str]:
        """The id and the fingerprint that the library gives to the loaded rows."""
        return [f"{self.path}[{self.split}]", self.load()._fingerprint]


Source = FileSource | HubSource


def unreadable(name: str, error: OSError) -> DataError:
    """The fault of a file that the system does not let us read."""
    found = f"a file that cannot be read ({error.strerror or type(error).__name__})"
    return Place(name).fault("unreadable file", found, "a file to read", "Check that it is there, its rights, the disk")


def resolve(spec: Any) -> tuple[Source, ...]:
    """Finds what a data argument means.

    Args:
        spec: A file, a folder (all data files in it, at any depth, sorted), a glob, an id of a dataset, an object
            {"path", "name", "split", "revision", "data_files"} as `datasets.load_dataset` takes them, with a "weight"
            if it is part of a mixture, or a list of these.

    Returns:
        At least one source, in the order given.

    Raises:
        ValueError: Nothing is there, or an object has an unknown field.
    """
    if isinstance(spec, dict):
        return _from_dict(spec)
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not spec:
            raise ValueError("data source: got an empty list, expected at least one file or dataset")
        return tuple(source for item in spec for source in resolve(item))
    if not isinstance(spec, (str, Path)):
        raise ValueError(f"data source: expected a path, an id, an object or a list of these, got {spec!r}")
    return _files(str(spec)) or (HubSource(str(spec)),)


def _from_dict(spec: dict) -> tuple[Source, ...]:
    for key in spec:
        if key not in HUB_KEYS:
            hint = did_you_mean(str(key), HUB_KEYS)
            known = ", ".join(HUB_KEYS)
            raise ValueError(f"data source {spec}: unknown field {key!r}, expected one of {known}. {hint}".strip())
    if not isinstance(spec.get("path"), str):
        raise ValueError(f'data source {spec}: expected "path" to name a file, a folder or a dataset')
    weight = _weight(spec)
    if spec["path"] == "pandas":
        raise ValueError("data source 'pandas': it reads pickles, which execute what they say; write them as parquet")
    own = ("path", "split", "weight")
    options = {key: value for key, value in spec.items() if key not in own and value is not None}
    files = _files(spec["path"]) if not options and spec.get("split") is None else ()
    sources = files or (HubSource(spec["path"], spec.get("split") or "train", options),)
    return tuple(replace(source, weight=weight) for source in sources)


def _weight(spec: dict) -> float:
    value = spec.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_WEIGHT:
        expected = f"a number above 0 and at most {MAX_WEIGHT}: how often an epoch sees each example"
        raise ValueError(f"data source {spec['path']!r}: weight: expected {expected}, got {value!r}")
    return float(value)


def _files(spec: str) -> tuple[Source, ...]:
    """The local files that `spec` names; none of them if it can only be the id of a dataset."""
    if not spec.strip() or "\0" in spec:
        raise ValueError(f"data source: expected a path or an id, got {spec!r}")
    try:
        return _from_path(spec)
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered, no such user (~name)
        raise ValueError(f"data source {spec!r}: it cannot be looked at: {error}") from None


def _from_path(spec: str) -> tuple[Source, ...]:
    path = Path(spec).expanduser()
    if path.is_file():
        return (FileSource(str(path)),)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"data source {spec!r}: the folder holds no file with one of {', '.join(SUFFIXES)}")
        return tuple(FileSource(file) for file in files)
    if glob.has_magic(spec):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise ValueError(f"data source {spec!r}: the pattern matches no file")
        return tuple(FileSource(file) for file in files)
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise ValueError(f"data source {spec!r}: there is no such file. {_neighbours(path)}".strip())
    return ()


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {str(path.parent)!r} does not exist either (paths are relative to {str(Path.cwd())!r})"
    return did_you_mean(path.name, [file.name for file in path.parent.iterdir()])
