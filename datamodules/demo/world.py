"""Questions and answers of the demo clinic, and which questions are held out.

A question puts a fact in a wording. Facts are the telling pairs of findings (those that no other condition has), and
the conditions themselves. Each fact is held out in one in three wordings, and each wording with one in three facts: a
held-out question joins a fact and a wording that never meet in training (findings: in neither order), though each of
them is met there with others. So what to answer can be learned, and the question as such is new.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Literal

from datamodules.demo import wording
from datamodules.demo.facts import ADVICE, AVOID, CONDITIONS, LANGUAGES, Condition, Language, Term

Split = Literal["train", "heldout"]
Kind = Literal["findings", "condition"]
Careless = Literal["half", "vague", "advice", "avoid", "condition"]
"""How an answer fails: parts are missing, it is of no use, or one part is wrong."""

Pair = tuple[Term, Term]

ONE_IN = 3
"""One question in so many is held out."""


@dataclass(frozen=True)
class Question:
    """A question and the condition that it is about."""

    kind: Kind
    language: Language
    text: str
    condition: Condition

    def record(self) -> dict[str, str]:
        """What a query holds: the question and the key to its answer, in the question's language."""
        c, language = self.condition, self.language
        return {
            "question": self.text,
            "language": language,
            "condition": c.name[language],
            "advice": c.advice[language],
            "avoid": c.avoid[language],
        }


def telling_pairs(condition: Condition) -> list[Pair]:
    """The pairs of the condition's findings that no other condition has."""
    owners = Counter(pair for c in CONDITIONS for pair in combinations(sorted(c.findings, key=str), 2))
    return [pair for pair in combinations(sorted(condition.findings, key=str), 2) if owners[pair] == 1]


def questions(split: Split, kind: Kind) -> list[Question]:
    """All questions of the split and kind, in a fixed order."""
    make = _finding_questions if kind == "findings" else _condition_questions
    return [
        Question(kind, language, text, c)
        for c in CONDITIONS
        for language in LANGUAGES
        for text in make(c, language, split)
    ]


def _finding_questions(condition: Condition, language: Language, split: Split) -> list[str]:
    number = CONDITIONS.index(condition)
    return [
        frame.format(a=a[language], b=b[language])
        for i, pair in enumerate(telling_pairs(condition))
        for frame in _frames(wording.FINDING_QUESTIONS[language], number + i, split)
        for a, b in (pair, pair[::-1])
    ]


def _condition_questions(condition: Condition, language: Language, split: Split) -> list[str]:
    number = CONDITIONS.index(condition)
    frames = _frames(wording.CONDITION_QUESTIONS[language], number, split)
    return [frame.format(condition=condition.name[language]) for frame in frames]


def _frames(frames: tuple[str, ...], fact: int, split: Split) -> list[str]:
    """The wordings in which the split asks about a fact; `fact` is its number."""
    return [frame for i, frame in enumerate(frames) if ((i + fact) % ONE_IN == 0) == (split == "heldout")]


def complete_answer(question: Question, number: int) -> str:
    """An answer that is right in all it should say, in the wording of that number."""
    frame = wording.COMPLETE_ANSWERS[question.language][number]
    return _fill(frame, question.language, question.condition)


def careless_answer(question: Question, number: int, rng: Random, kinds: tuple[Careless, ...]) -> str:
    """An answer that says too little, or something wrong: it fails in one of `kinds`.

    One that is wrong differs from the complete answer of the same number in the wrong part alone.
    """
    language, condition = question.language, question.condition
    kind = rng.choice(kinds)
    if kind in ("half", "vague"):
        frames = wording.HALF_ANSWERS if kind == "half" else wording.VAGUE_ANSWERS
        return _fill(frames[language][number], language, condition)
    return _fill(wording.COMPLETE_ANSWERS[language][number], language, _mistaken(condition, kind, rng))


def _mistaken(condition: Condition, kind: Careless, rng: Random) -> Condition:
    """The condition with one part taken from elsewhere, or another condition that shares a finding with it."""
    if kind == "condition":
        return rng.choice([c for c in CONDITIONS if c != condition and set(c.findings) & set(condition.findings)])
    if kind == "advice":
        return replace(condition, advice=rng.choice([term for term in ADVICE.values() if term != condition.advice]))
    assert kind == "avoid"
    return replace(condition, avoid=rng.choice([term for term in AVOID.values() if term != condition.avoid]))


def _fill(frame: str, language: Language, c: Condition) -> str:
    return frame.format(condition=c.name[language], advice=c.advice[language], avoid=c.avoid[language])
