"""The world is closed and consistent, and the split keeps held-out questions out of training."""

from __future__ import annotations

from itertools import combinations

import pytest

from datamodules.demo import wording
from datamodules.demo.facts import ADVICE, AVOID, CONDITIONS, FINDINGS, LANGUAGES
from datamodules.demo.world import questions, telling_pairs


def test_there_are_24_conditions_with_four_findings_each():
    assert len(CONDITIONS) == 24
    assert all(len(set(c.findings)) == 4 for c in CONDITIONS)


def test_every_finding_advice_and_thing_to_avoid_is_used():
    assert {f for c in CONDITIONS for f in c.findings} == set(FINDINGS.values())
    assert {c.advice for c in CONDITIONS} == set(ADVICE.values())
    assert {c.avoid for c in CONDITIONS} == set(AVOID.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_name_is_used_twice(language):
    terms = [*FINDINGS.values(), *ADVICE.values(), *AVOID.values(), *(c.name for c in CONDITIONS)]
    names = [term[language] for term in terms]
    assert len(set(names)) == len(names)


def test_no_two_conditions_have_the_same_advice_and_the_same_thing_to_avoid():
    assert len({(c.advice, c.avoid) for c in CONDITIONS}) == len(CONDITIONS)


def test_a_telling_pair_of_findings_belongs_to_one_condition_and_each_condition_has_several():
    for condition in CONDITIONS:
        pairs = telling_pairs(condition)
        assert len(pairs) >= 4
        for pair in pairs:
            assert [c for c in CONDITIONS if set(pair) <= set(c.findings)] == [condition]


def test_each_telling_pair_is_listed():
    for condition in CONDITIONS:
        shared = [
            pair
            for pair in combinations(condition.findings, 2)
            if any(set(pair) <= set(c.findings) for c in CONDITIONS if c != condition)
        ]
        assert len(shared) + len(telling_pairs(condition)) == 6


@pytest.mark.parametrize("kind", ["findings", "condition"])
def test_train_and_held_out_questions_are_disjoint(kind):
    train, held_out = ({q.text for q in questions(split, kind)} for split in ("train", "heldout"))
    assert train and held_out
    assert not train & held_out


def test_two_findings_in_a_held_out_wording_never_meet_in_training_in_either_order():
    asked = {split: {q.text for q in questions(split, "findings")} for split in ("train", "heldout")}
    for condition in CONDITIONS:
        for a, b in telling_pairs(condition):
            for language in LANGUAGES:
                for frame in wording.FINDING_QUESTIONS[language]:
                    both = {frame.format(a=a[language], b=b[language]), frame.format(a=b[language], b=a[language])}
                    assert [bool(both & asked[split]) for split in asked].count(True) == 1, both


@pytest.mark.parametrize("kind", ["findings", "condition"])
def test_each_condition_is_asked_about_in_training_and_held_out_in_both_languages(kind):
    for split in ("train", "heldout"):
        asked = {(q.condition.name, q.language) for q in questions(split, kind)}
        assert asked == {(c.name, language) for c in CONDITIONS for language in LANGUAGES}


def test_each_fact_that_is_asked_about_held_out_is_asked_about_in_training_in_other_words():
    train = [q for kind in ("findings", "condition") for q in questions("train", kind)]
    for question in questions("heldout", "findings"):
        c, language = question.condition, question.language
        pair = [f[language] for f in c.findings if f[language] in question.text]
        assert any(q.language == language and q.condition == c and all(f in q.text for f in pair) for q in train)


def test_a_third_of_the_questions_is_held_out():
    train, held_out = (sum(len(questions(s, k)) for k in ("findings", "condition")) for s in ("train", "heldout"))
    assert held_out / (train + held_out) == pytest.approx(1 / 3, abs=0.01)
