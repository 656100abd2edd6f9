"""Where records come from: files, folders, globs, lists of them, and ids of the `datasets` library."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.formats.errors import did_you_mean

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
HUB_KEYS = ("path", "name", "split", "revision", "data_files")


@dataclass(frozen=True)
class FileSource:
    """One local file."""

    path: str

    def fingerprint(self) -> list[str]:
        """The path, since error messages name it, and a digest of the content."""
        digest = hashlib.blake2b(digest_size=16)
        with open(self.path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return [self.path, digest.hexdigest()]


@dataclass(frozen=True)
class HubSource:
    """A dataset that `datasets.load_dataset` knows; `options` are its further arguments."""

    path: str
    split: str = "train"
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The rows, downloaded at the first time."""
        import datasets

        try:
            return datasets.load_dataset(self.path, split=self.split, **self.options)
        except Exception as error:  # the library raises a dozen unrelated types, and users need one sentence
            raise ValueError(
                f"data source {self.path!r} (split {self.split!r}): it is neither a file, a folder nor a glob that "
                f"matches something, and as an id of a dataset it cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    def fingerprint(self) -> list[str]:
        """The id and the fingerprint that the library gives to the loaded rows."""
        return [f"{self.path}[{self.split}]", self.load()._fingerprint]


Source = FileSource | HubSource


def resolve(spec: Any) -> tuple[Source, ...]:
    """Finds what a data argument means.

    Args:
        spec: A file, a folder (all data files in it, at any depth, sorted), a glob, an id of a dataset, an object
            {"path", "name", "split", "revision", "data_files"} as `datasets.load_dataset` takes them, or a list of
            these.

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
    return _from_path(str(spec)) or (HubSource(str(spec)),)


def _from_dict(spec: dict) -> tuple[Source, ...]:
    for key in spec:
        if key not in HUB_KEYS:
            hint = did_you_mean(str(key), HUB_KEYS)
            known = ", ".join(HUB_KEYS)
            raise ValueError(f"data source {spec}: unknown field {key!r}, expected one of {known}. {hint}".strip())
    if not isinstance(spec.get("path"), str):
        raise ValueError(f'data source {spec}: expected "path" to name a file, a folder or a dataset')
    options = {key: value for key, value in spec.items() if key not in ("path", "split") and value is not None}
    files = _from_path(spec["path"]) if not options and spec.get("split") is None else ()
    return files or (HubSource(spec["path"], spec.get("split") or "train", options),)


def _from_path(spec: str) -> tuple[Source, ...]:
    """The local files that `spec` names; none of them if it can only be the id of a dataset."""
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
