"""A sharded checkpoint's list of contents, which torch writes as a pickle, read without executing anything.

The pickle's objects are replaced by inert ones; torch's own are then made from the numbers and names in these.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

LIST = ".metadata"
_OF_METADATA = ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
ALLOWED = {
    "torch.distributed.checkpoint.metadata": (*_OF_METADATA, "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),  # and data types
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}
"""What `torch.distributed.checkpoint` names in the list of a checkpoint that holds tensors alone."""
DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,  # of a length that was changed
    TypeError,
    ValueError,
)
"""What a damaged pickle raises; it depends on where the damage is."""


class ListReader(FileSystemReader):
    """torch's reader of a folder, which trusts the list of contents; this one does not."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list; see `read_list`."""
        metadata = read_list(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_list(folder: Path) -> Metadata:
    """What tensors a sharded checkpoint holds, and where.

    Raises:
        ValueError: It holds anything else; nothing of it was executed.
    """
    path = folder / LIST
    try:
        with open(path, "rb") as file:
            return _metadata(_Unpickler(file).load())
    except _NamedError as error:
        raise ValueError(
            f"{path}: it holds a pickled {error}, which describes no tensor. Reading it would execute what the file "
            "says, so it was not read; go on from a checkpoint of this library"
        ) from None
    except DAMAGE as error:
        raise ValueError(
            f"{path}: it is no list of a sharded checkpoint's tensors, or it is damaged ({error})"
        ) from error


class _NamedError(Exception):
    """Something that the list may not name; its text is the name."""


class _Inert:
    """Stands for an object of the pickle: keeps what is said of it, and does nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if name not in ALLOWED.get(module, ()):
            raise _NamedError(f"{module}.{name}")
        return type(name, (_Inert,), {})  # a new one each time: whatever the pickle did to it would be gone


def _metadata(kept: Any) -> Metadata:
    fields = _fields(kept, "Metadata")
    return Metadata(
        {_a(str, name): _tensor(stored) for name, stored in fields["state_dict_metadata"].items()},
        storage_data={_index(index): _place(place) for index, place in fields["storage_data"].items()},
        storage_meta=StorageMeta(),
        version=fields.get("version"),
    )


def _tensor(kept: Any) -> TensorStorageMetadata:
    # Anything but a tensor (BytesStorageMetadata) torch would unpickle without a guard.
    fields = _fields(kept, "TensorStorageMetadata")
    dtype = _a(torch.dtype, _named(fields["properties"], "TensorProperties").state[0])
    parts = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    size, chunks = _size(fields["size"]), [ChunkStorageMetadata(_size(p["offsets"]), _size(p["sizes"])) for p in parts]
    _check_chunks(size, chunks)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _check_chunks(size: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """Refuses chunks that leave a part of the tensor out: torch would leave there what the memory held before."""
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    inside = all(
        min(start, length) >= 0 and start + length <= most
        for chunk in chunks
        for start, length, most in zip(chunk.offsets, chunk.sizes, size, strict=True)
    )
    whole = sum(math.prod(chunk.sizes) for chunk in filled) == math.prod(size)
    if not inside or not whole or len({chunk.offsets for chunk in filled}) < len(filled):
        raise ValueError(f"chunks that do not make up a tensor of shape {tuple(size)}")


def _index(kept: Any) -> MetadataIndex:
    fields = _fields(kept, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _a(str, fields["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _a(int, index),
    )


def _place(kept: Any) -> _StorageInfo:
    fields = _fields(kept, "_StorageInfo")
    name = _a(str, fields["relative_path"])
    if name == ".." or Path(name).name != name or fields.get("transform_descriptors"):
        raise ValueError(f"a shard in {name!r}; expected a plain file of the same folder")
    return _StorageInfo(name, _a(int, fields["offset"]), _a(int, fields["length"]))


def _size(kept: Any) -> torch.Size:
    (numbers,) = _named(kept, "Size").arguments
    return torch.Size(_a(int, number) for number in numbers)


def _fields(kept: Any, name: str) -> dict[str, Any]:
    return _a(dict, _named(kept, name).state)


def _named(kept: Any, name: str) -> _Inert:
    if not isinstance(kept, _Inert) or type(kept).__name__ != name:
        raise ValueError(f"a {type(kept).__name__} where a {name} has to be")
    return kept


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} has to be")
    return value
