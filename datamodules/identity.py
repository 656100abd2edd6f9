"""What the examples of every optimizer step depend on, so that a resumed run sees the same ones or says why not."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def identity_of(parts: dict[str, Any], plan: dict[str, Any]) -> dict[str, str]:
    """Everything that examples and their order depend on, by name; plain texts, to be kept in a checkpoint.

    Args:
        parts: What the tokenised training rows depend on, as `tokenise` gives it.
        plan: Settings of the step plan, by name.

    Returns:
        Values to compare; files count by their content, wherever they lie.
    """
    contents = [source[1:] for source in parts["data"]]
    settings = {f"data.{name}": value for name, value in {**parts["settings"], **plan}.items()}
    digests = {"data.train": contents, "data.tokenizer": parts["tokenizer"], "row format": parts["version"]}
    return {
        **{name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in digests.items()},
        **{name: json.dumps(value) for name, value in settings.items()},
    }


def check_same(stored: dict[str, str], now: dict[str, str]) -> None:
    """Refuses to go on with other data, another tokenizer or another plan than the run began with.

    Raises:
        ValueError: Names every difference.
    """
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if names:
        found = "; ".join(_difference(name, stored.get(name), now.get(name)) for name in names)
        raise ValueError(
            f"the checkpoint cannot be resumed: {found}. A resumed run has to see the same examples in the same steps; "
            "restore what has changed, or begin a new run from the exported weights"
        )


def _difference(name: str, stored: str | None, now: str | None) -> str:
    if None not in (stored, now) and name in ("data.train", "data.tokenizer", "row format"):
        what = {"data.train": "the contents of the files are", "data.tokenizer": "the tokenizer is"}
        return f"{name}: {what.get(name, 'it is')} not what the run began with"
    return f"{name}: the run began with {stored or 'nothing'}, now it is {now or 'nothing'}"
