"""The committed corpus: what the generator makes, in the formats that the data modules read."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random

import pytest

from datamodules.demo.__main__ import HERE, main
from datamodules.demo.checker import judge
from datamodules.demo.corpus import PREAMBLE_SHARE, SIZES, corpus
from datamodules.demo.facts import CONDITIONS, LANGUAGES
from datamodules.demo.world import careless_answer, questions

COMMITTED = HERE / "corpus"
KINDS = ("half", "vague", "advice", "avoid", "condition")


@pytest.fixture(scope="module")
def files():
    return corpus(seed=0)


def records(files, name):
    return [json.loads(line) for line in files[name].decode().splitlines()]


def asked(files, split):
    """All questions of the split's files, by file."""
    conversations = [r["conversations"] for r in records(files, f"sft.{split}.jsonl")]
    return {
        "sft": {turns[-2]["value"] for turns in conversations},
        "preference": {r["question"] for r in records(files, f"preference.{split}.jsonl")},
        "queries": {r["question"] for r in records(files, f"queries.{split}.jsonl")},
    }


@pytest.fixture(scope="module")
def keys():
    """Question -> its record, for all questions of the world."""
    every = [q for split in ("train", "heldout") for kind in ("findings", "condition") for q in questions(split, kind)]
    return {question.text: question.record() for question in every}


def test_the_committed_files_are_what_the_generator_makes(files):
    assert {path.name: path.read_bytes() for path in COMMITTED.iterdir()} == files


def test_the_command_writes_the_same_files(files, tmp_path, capsys):
    main(["corpus", "--out", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert f"{len(files)} files" in capsys.readouterr().out


def test_another_seed_gives_another_corpus(files):
    other = corpus(seed=1)
    assert other.keys() == files.keys()
    assert all(other[name] != files[name] for name in files)


def test_the_whole_corpus_is_smaller_than_a_megabyte(files):
    assert sum(map(len, files.values())) < 1_000_000
    assert 150_000 < len(files["pretrain.train.txt"]) < 250_000


def test_no_held_out_question_is_asked_in_any_training_file(files):
    train, held_out = (set.union(*asked(files, split).values()) for split in ("train", "heldout"))
    assert train and held_out
    assert not train & held_out


@pytest.mark.parametrize("name", ["preference.heldout.jsonl", "queries.heldout.jsonl"])
def test_no_held_out_question_is_asked_twice(files, name):
    texts = [record["question"] for record in records(files, name)]
    assert len(set(texts)) == len(texts) == SIZES[name.split(".")[0]]["heldout"]


def test_the_articles_tell_each_fact_in_both_languages(files):
    articles = files["pretrain.train.txt"].decode().splitlines()
    for condition in CONDITIONS:
        for language in LANGUAGES:
            told = " ".join(a for a in articles if condition.name[language] in a)
            facts = (*condition.findings, condition.advice, condition.avoid)
            assert all(fact[language] in told for fact in facts)


def test_held_out_articles_are_new(files):
    train, held_out = (set(files[f"pretrain.{split}.txt"].decode().splitlines()) for split in ("train", "heldout"))
    assert not train & held_out


def test_conversations_are_in_from_value_form_and_end_with_an_answer(files):
    for record in records(files, "sft.train.jsonl"):
        roles = [turn["from"] for turn in record["conversations"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns[-1] == "gpt"
        assert all(a != b for a, b in pairwise(turns)) and set(turns) == {"human", "gpt"}
        assert all(turn["value"] for turn in record["conversations"])


def test_about_half_of_the_conversations_end_with_a_right_answer(files, keys):
    answers = [r["conversations"][-2:] for r in records(files, "sft.train.jsonl")]
    right = [judge(keys[question["value"]], answer["value"]) for question, answer in answers]
    assert sum(right) / len(right) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_chosen_answer_is_right_and_every_rejected_one_is_wrong(files, keys, split):
    for record in records(files, f"preference.{split}.jsonl"):
        assert set(record) == {"system", "history", "question", "response_chosen", "response_rejected"}
        key = keys[record["question"]]
        assert judge(key, record["response_chosen"])
        assert not judge(key, record["response_rejected"])


def test_some_pairs_have_a_system_prompt_and_some_a_history(files):
    pairs = records(files, "preference.train.jsonl")
    for field in ("system", "history"):
        assert sum(bool(r[field]) for r in pairs) / len(pairs) == pytest.approx(PREAMBLE_SHARE, abs=0.03)
    assert all(len(turn) == 2 for r in pairs for turn in r["history"])


def test_queries_hold_the_key_to_their_answer(files, keys):
    for record in records(files, "queries.heldout.jsonl"):
        assert record == keys[record["question"]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_careless_answer_is_wrong(kind):
    rng = Random(0)
    for question in questions("train", "condition"):
        for number in range(3):
            assert not judge(question.record(), careless_answer(question, number, rng, (kind,)))
