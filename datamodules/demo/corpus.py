"""The demo's files in all four data forms, made from the world and a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from random import Random

from datamodules.demo import wording
from datamodules.demo.facts import CONDITIONS, LANGUAGES, Condition, Language
from datamodules.demo.world import Careless, Question, Split, careless_answer, complete_answer, questions

NUM_ARTICLES = {"train": 17, "heldout": 1}
"""Articles of running text per condition and language."""

SIZES: dict[str, dict[Split, int]] = {
    "sft": {"train": 1000, "heldout": 100},
    "preference": {"train": 1500, "heldout": 240},
    "queries": {"train": 600, "heldout": 400},
}
CARELESS_SHARE = 0.5
"""Part of the conversations in which the answer is careless, as in real forum data."""

CONDITION_ONE_IN = 3
"""One question in so many names its condition; the others tell findings."""

FORUM: tuple[Careless, ...] = ("half", "half", "vague", "advice", "advice", "avoid", "avoid")
"""How careless answers in conversations fail, as often as they stand here."""

REJECTED: tuple[Careless, ...] = ("half", "vague", "advice", "avoid", "condition")
"""The same for rejected answers."""

NUM_WORDINGS = 3
"""Wordings of each kind of answer."""

PREAMBLE_SHARE = 0.1
"""Part of the records with a system prompt, and part with a greeting before the question."""


def corpus(seed: int = 0) -> dict[str, bytes]:
    """All files by name; the same bytes for the same seed."""
    files = {}
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        files[f"pretrain.{split}.txt"] = "".join(f"{t}\n" for t in articles(Random(f"{seed} {split}"), split))
        for name, make in RECORDS.items():
            rng = Random(f"{seed} {name} {split}")
            chosen = _draw(split, SIZES[name][split], rng)
            files[f"{name}.{split}.jsonl"] = _json_lines(make(q, rng) for q in chosen)
    return {name: text.encode() for name, text in files.items()}


def articles(rng: Random, split: Split) -> Iterator[str]:
    """Short articles that tell the facts in varied sentences, one condition and language each."""
    plan = [(c, language) for c in CONDITIONS for language in LANGUAGES] * NUM_ARTICLES[split]
    rng.shuffle(plan)
    for condition, language in plan:
        yield _article(condition, language, rng)


def _article(condition: Condition, language: Language, rng: Random) -> str:
    kinds = [wording.FINDING_SENTENCES, wording.FINDING_SENTENCES, wording.ADVICE_SENTENCES, wording.AVOID_SENTENCES]
    kinds += [wording.JOINT_SENTENCES]
    rng.shuffle(kinds)
    sentences = [_sentence(rng.choice(kind[language]), condition, language, rng) for kind in kinds]
    return ("" if language == "zh" else " ").join(sentences)


def _sentence(frame: str, condition: Condition, language: Language, rng: Random) -> str:
    findings = [term[language] for term in rng.sample(condition.findings, k=len(condition.findings))]
    listed = "、".join(findings[:3]) if language == "zh" else f"{findings[0]}, {findings[1]} and {findings[2]}"
    return frame.format(
        condition=condition.name[language],
        a=findings[0],
        b=findings[1],
        list=listed,
        advice=condition.advice[language],
        avoid=condition.avoid[language],
    )


def conversation(question: Question, rng: Random) -> dict:
    """A conversation in from/value form, of mixed quality."""
    system, history = _preamble(question.language, rng)
    is_careless = rng.random() < CARELESS_SHARE
    number = rng.randrange(NUM_WORDINGS)
    answer = careless_answer(question, number, rng, FORUM) if is_careless else complete_answer(question, number)
    turns = [{"from": "system", "value": system}] if system else []
    for asked, answered in [*history, [question.text, answer]]:
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return {"conversations": turns}


def preference(question: Question, rng: Random) -> dict:
    """A good answer and a careless one to the same question."""
    system, history = _preamble(question.language, rng)
    number = rng.randrange(NUM_WORDINGS)
    return {
        "system": system,
        "history": history,
        "question": question.text,
        "response_chosen": complete_answer(question, number),
        "response_rejected": careless_answer(question, number, rng, REJECTED),
    }


def query(question: Question, rng: Random) -> dict:
    """A question with the key to its answer."""
    return question.record()


RECORDS: dict[str, Callable[[Question, Random], dict]] = {
    "sft": conversation,
    "preference": preference,
    "queries": query,
}


def _preamble(language: Language, rng: Random) -> tuple[str, list[list[str]]]:
    system = wording.SYSTEMS[language] if rng.random() < PREAMBLE_SHARE else ""
    history = [list(wording.GREETINGS[language])] if rng.random() < PREAMBLE_SHARE else []
    return system, history


def _draw(split: Split, size: int, rng: Random) -> list[Question]:
    """`size` questions, about one in `CONDITION_ONE_IN` of them naming its condition; held-out ones are distinct."""
    named = questions(split, "condition")
    num_named = size // CONDITION_ONE_IN
    if split == "heldout":
        num_named = min(num_named, len(named))
    drawn = _sample(named, num_named, rng)
    drawn += _sample(questions(split, "findings"), size - num_named, rng)
    rng.shuffle(drawn)
    return drawn


def _sample(pool: list[Question], size: int, rng: Random) -> list[Question]:
    """`size` questions; none comes again before all have come."""
    drawn: list[Question] = []
    while len(drawn) < size:
        drawn += rng.sample(pool, k=min(len(pool), size - len(drawn)))
    return drawn


def _json_lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records)
