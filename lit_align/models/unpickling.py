"""Files that could execute what they say, and are not let."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError


@contextmanager
def nothing_executed(path: str | Path | None) -> Iterator[None]:
    """While open, a pickle that was read with `weights_only=True` and refused becomes an error for people.

    Args:
        path: What is being read.

    Raises:
        ValueError: It holds more than tensors and plain values.
    """
    try:
        yield
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a pickled {named[1]}" if named else "something"
        raise ValueError(
            f"{path}: it holds {what}, which is neither a tensor nor a plain value. Reading it would execute what the "
            "file says, so it was not read; weights without code are safetensors, and checkpoints of this library"
        ) from error
