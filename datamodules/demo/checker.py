"""Judges answers of the demo clinic: strictly right or wrong, and a graded reward for reinforcement learning.

The world is closed, so nothing is left to taste. A right answer is one that the clinic itself would give: it names
the condition, gives its advice and says what to avoid, in one of the clinic's own sentences and in the language of
the question, and it ends there.

A question record holds `question`, `language`, and the key: `condition`, `advice`, `avoid` (see `corpus.query`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.demo.facts import ADVICE, AVOID, CONDITIONS, LANGUAGES, Language
from datamodules.demo.wording import COMPLETE_ANSWERS

PART_CREDIT = 0.2
"""Reward for each of the three parts that is right in an answer that as a whole is not."""

END_OF_TURN = "<|im_end|>"
AVOID_MARKS: dict[Language, tuple[str, ...]] = {"en": ("avoid ",), "zh": ("别", "不要", "不能")}
TERMS = {"condition": [c.name for c in CONDITIONS], "advice": ADVICE.values(), "avoid": AVOID.values()}
FOREIGN: dict[Language, re.Pattern[str]] = {"en": re.compile(r"[\u4e00-\u9fff]"), "zh": re.compile(r"[A-Za-z]")}


def judge(record: Mapping[str, Any], answer: str) -> bool:
    """Whether the answer is right.

    Args:
        record: The question with its key.
        answer: What was generated, without the prompt; one end-of-turn token at its end is allowed. An answer that
            ran into the length limit has to be counted as wrong by the caller, who alone knows.

    Raises:
        ValueError: The record is no question record.
    """
    frames = COMPLETE_ANSWERS[_language(record)]
    return _bare(answer) in {frame.format_map(record) for frame in frames}


def reward(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
    """One number in [0, 1] per response: 1 = right, `PART_CREDIT` for each right part of any other.

    A part earns its credit if it is said once, in its role (only what is to be avoided stands after "avoid"), and
    no rival of it is named: naming all conditions earns nothing. Nor does an answer in mixed languages.

    Args:
        prompts: Not looked at; the records say what was asked.
        responses: Decoded responses.
        records: The question record of each response.
    """
    return [_grade(record, response) for record, response in zip(records, responses, strict=True)]


def _grade(record: Mapping[str, Any], response: str) -> float:
    if judge(record, response):
        return 1.0
    if FOREIGN[_language(record)].search(_bare(response)):
        return 0.0
    return PART_CREDIT * sum(_part_is_right(record, response, part) for part in TERMS)


def _part_is_right(record: Mapping[str, Any], response: str, part: str) -> bool:
    language = _language(record)
    mentions = _mentions(response, [term[language] for term in TERMS[part]], language)
    if [term for term, _ in mentions] != [record[part]]:
        return False
    before = response[: mentions[0][1]]
    return before.endswith(AVOID_MARKS[language]) == (part == "avoid")


def _mentions(text: str, terms: Sequence[str], language: Language) -> list[tuple[str, int]]:
    """Each mention of one of `terms` with its place; the longer term wins where two overlap."""
    either = "|".join(re.escape(term) for term in sorted(terms, key=len, reverse=True))
    pattern = rf"\b(?:{either})\b" if language == "en" else either
    return [(match.group(), match.start()) for match in re.finditer(pattern, text)]


def _language(record: Mapping[str, Any]) -> Language:
    missing = [field for field in ("language", *TERMS) if field not in record]
    if missing or record["language"] not in LANGUAGES:
        found = f"no {', '.join(missing)}" if missing else f"language {record['language']!r}"
        raise ValueError(
            f"question record: expected the fields language ({' or '.join(LANGUAGES)}), {', '.join(TERMS)}, "
            f"got {found}; the demo's checker judges the demo's own queries"
        )
    return record["language"]


def _bare(answer: str) -> str:
    return answer.strip().removesuffix(END_OF_TURN).strip()
