"""Ready-made rewards for `reward_functions`; each also shows what a function of one's own looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def chinese_share(prompts: Sequence[str], answers: Sequence[str], records: Sequence[dict[str, Any]]) -> list[float]:
    """Share of an answer's letters that are Chinese, in [0, 1]: a policy that should answer in Chinese.

    Args:
        prompts: Rendered prompts; not looked at.
        answers: Answers without special tokens.
        records: The records that the prompts came from; not looked at.

    Returns:
        One number per answer; 0 for one without letters.
    """
    return [_share(answer) for answer in answers]


def _share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum("\u4e00" <= c <= "\u9fff" for c in letters) / max(len(letters), 1)
