"""Faults survive the way from worker processes, and several are told as one."""

from __future__ import annotations

import pickle

import pytest

from datamodules.formats import DataError, OverlongError, Place
from datamodules.formats.errors import first_of, quote

FAULT = Place("a.jsonl:1")["conversations"][2]["value"].fault("empty field", "an empty text", "a text", "Fill it in")


def test_a_fault_says_where_what_and_how_to_mend_it():
    assert str(FAULT) == "a.jsonl:1: conversations[2].value: found an empty text; expected a text. Fill it in"


@pytest.mark.parametrize("kind", [DataError, OverlongError])
def test_a_fault_survives_pickle_and_text(kind):
    fault = kind("r", "a:1", "f", "x\ud800", "y", "z")
    for copy in (pickle.loads(pickle.dumps(fault)), DataError.load(fault.dump())):
        assert type(copy) is kind
        assert (str(copy), copy.reason, copy.origin, copy.field) == (str(fault), "r", "a:1", "f")


def test_many_faults_are_counted_and_the_first_five_are_quoted():
    faults = [Place(f"a.jsonl:{i}").fault("odd" if i % 2 else "even", f"{i}", "nothing") for i in range(1, 9)]
    text = str(first_of(faults))
    assert text.startswith("a.jsonl:1: found 1;")
    assert "the first of 8 faults (4 odd, 4 even)" in text
    assert "a.jsonl:5: found 5" in text and "a.jsonl:6" not in text and "and 3 more" in text
    assert first_of(faults[:1]) is faults[0]


def test_quotes_are_short_and_printable():
    assert quote("a" * 100) == 'the text "' + "a" * 57 + '..."'
    assert quote("a\x00") == r"the text 'a\x00'"
    assert quote({"a": 1}) == "an object with the fields a"
    assert [quote(None), quote(True), quote([1])] == ["null", "a boolean (True)", "a list ([1])"]
