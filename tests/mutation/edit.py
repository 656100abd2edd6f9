"""What a wrong edit is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One wrong edit: `old` becomes `new` in lit_align/`file`, and `test` (a node id below tests/) has to fail.

    `old` stands exactly once in the file.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
