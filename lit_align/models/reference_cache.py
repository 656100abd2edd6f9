"""What a reference says of a fixed set of examples, computed once and kept in a small file.

The file's name is a digest of everything that its numbers depend on: the weights and the settings of the network, the
token ids of every example, and what computed them. So a changed record, tokenizer, template, budget or weight meets
another file, never a stale one. The file is written whole or not at all, and says what it should hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lit_align.batch import Example, MicroBatch
from lit_align.models.checkpoint import plain_config
from lit_align.models.fingerprint import base_fingerprint
from lit_align.models.forward import base_model
from lit_align.models.sameness import UNIMPORTANT

VERSION = 1
"""Of the file and of how its numbers are made: raising it makes every older file stale."""


class DamagedError(ValueError):
    """A file that does not hold what it says it holds."""


def cache_folder(root: str | None = None) -> Path:
    """Where the files are kept: `root`, else $LIT_ALIGN_CACHE, else ~/.cache/lit_align, each with /reference below."""
    return Path(root or os.environ.get("LIT_ALIGN_CACHE") or Path.home() / ".cache" / "lit_align") / "reference"


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of all examples in their order, and over which tokens are scored.

    It reads no text and no path: whatever changes an id, a border between prompt and answer, the order or the number
    of examples changes it, and nothing else does.
    """
    digest = hashlib.sha256()
    for index in range(len(examples)):
        example = examples[index]
        parts = [example.prefix_ids, *(part for b in example.branches for part in (b.input_ids, b.weights > 0))]
        digest.update(json.dumps([len(part) for part in parts]).encode())
        for part in parts:
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Everything about a causal language model, adapters off, that its log-probabilities depend on; plain types.

    Two networks that differ in adapters or in dropout alone are described alike.
    """
    base = base_model(network)
    config = json.loads(plain_config(base).to_json_string(use_diff=False))
    return {
        "fingerprint": base_fingerprint(network),
        "class": type(base).__name__,
        "attention": base.config._attn_implementation,
        "config": {key: value for key, value in config.items() if key not in UNIMPORTANT},
    }


def describe_machine(device: torch.device) -> dict[str, str]:
    """What computes: its kind and the libraries, of which another version may round otherwise."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def cache_key(**parts: Any) -> str:
    """The name of the file whose numbers depend on these parts (plain types): 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()


def write_logps(path: Path, logps: Tensor) -> None:
    """Writes a table beside its final name, and moves it there once it is on the disk.

    Args:
        path: `<key>.safetensors`; the file repeats its key.
        logps: Summed log-probability of each example's branches in nats, float64 or float32 [N, branches].

    Raises:
        OSError: It cannot be written.
    """
    logps = logps.detach().cpu().contiguous()
    content = save({"logps": logps}, {"key": path.stem, "sha256": _digest(logps)})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem[:16]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_logps(path: Path, num_examples: int) -> Tensor:
    """The table as it was written.

    Args:
        path: As `write_logps` took it.
        num_examples: N, to be compared.

    Returns:
        float64 or float32 [N, branches], on the CPU.

    Raises:
        FileNotFoundError: There is none.
        DamagedError: It is not whole, or not the one that its name promises.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, "pt") as file:
            metadata, logps = file.metadata() or {}, file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"it cannot be read ({error})") from error
    if metadata.get("key") != path.stem:
        raise DamagedError("it was written under another name")
    if metadata.get("sha256") != _digest(logps):
        raise DamagedError("its numbers are not those that were written")
    if len(logps) != num_examples:
        raise DamagedError(f"it holds {len(logps)} examples, and there are {num_examples}")
    return logps


def sequence_logps(table: Tensor, batch: MicroBatch) -> Tensor:
    """The numbers of a micro-batch's sequences, looked up by the examples' indices.

    Args:
        table: [N, branches], on the micro-batch's device.
        batch: Its `indices` count in the data that the table is of.

    Returns:
        [S], in the table's dtype.
    """
    logps = table.new_zeros(batch.num_sequences)
    logps[batch.groups.flatten()] = table.index_select(0, batch.indices).flatten()
    return logps


def _digest(logps: Tensor) -> str:
    return hashlib.sha256(f"{logps.dtype} {tuple(logps.shape)}\n".encode() + logps.numpy().tobytes()).hexdigest()
