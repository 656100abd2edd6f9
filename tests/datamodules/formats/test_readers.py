"""Files of every kind give their records with file and line, and broken ones say where they break."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules.formats import DataError, FileSource, HubSource, Place, read, readers
from datamodules.formats.fields import parse_json


def load(path, *, pieces=False):
    """Records with line numbers, and faults, of one file."""
    faults = []
    rows = list(read([FileSource(path)], faults.append, pieces=pieces))
    prefix = path + ":"
    assert all(row.origin.startswith(prefix) for row in rows)
    return [(int(row.origin.removeprefix(prefix)), json.loads(row.text)) for row in rows], faults


def test_json_lines_have_their_line_numbers_and_blank_lines_are_no_records(write):
    path = write("a.jsonl", '{"a": 1}\n\n  \n{"a": "水"}')
    assert load(path) == ([(1, {"a": 1}), (4, {"a": "水"})], [])


@pytest.mark.parametrize("content", ['\ufeff{"a": "x"}\n{"a": "y"}\n', '{"a": "x"}\r\n{"a": "y"}\r\n'])
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json"])
def test_byte_order_marks_and_windows_line_ends_are_tolerated(write, content, suffix):
    assert load(write(f"a.{suffix}", content)) == ([(1, {"a": "x"}), (2, {"a": "y"})], [])


def test_a_json_list_gives_records_with_the_lines_they_begin_at(write):
    path = write("a.json", '[\n  {"a": 1,\n   "b": [2]},\n  {"a": 3}, {"a": 4}\n]\n')
    assert load(path) == ([(2, {"a": 1, "b": [2]}), (4, {"a": 3}), (4, {"a": 4})], [])


def test_a_json_list_of_messages_is_one_conversation(write):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert load(write("a.json", json.dumps(turns, indent=1))) == ([(2, turns)], [])
    assert load(write("b.json", json.dumps([turns, turns]))) == ([(1, turns), (1, turns)], [])


def test_parquet_rows_are_numbered_from_1(tmp_path):
    path = str(tmp_path / "a.parquet")
    day = datetime.date(2020, 1, 2)
    pq.write_table(pa.table({"text": ["x", None], "turns": [[{"from": "human"}], []], "day": [day, day]}), path)
    assert load(path)[0] == [
        (1, {"text": "x", "turns": [{"from": "human"}], "day": "2020-01-02"}),
        (2, {"text": None, "turns": [], "day": "2020-01-02"}),
    ]


def test_a_text_file_is_one_document(write):
    assert load(write("a.txt", "\ufeff一\r\n二\n")) == ([(1, {"text": "一\n二\n"})], [])


def test_a_long_text_is_cut_at_single_line_breaks_between_letters_alone(write, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 10)
    text = "one one one\n  indented\n\ntwo two two\nthree three\nfour four \nfive\n"
    path = write("a.txt", text)
    rows = list(read([FileSource(path)], pytest.fail, pieces=True))
    texts = [json.loads(row.text)["text"] for row in rows]
    assert "".join(texts) == text and len(texts) == 3
    assert [row.continues for row in rows] == [True, True, False]
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:5", f"{path}:6"]
    assert [json.loads(row.text)["text"] for row in read([FileSource(path)], pytest.fail)] == [text]


def test_a_dataset_of_the_datasets_library_gives_its_rows(tmp_path, write):
    path = write("a.csv", "text,n\nx,1\ny,2\n")
    rows = list(read([HubSource("csv", "train", {"data_files": path})], pytest.fail))
    assert [json.loads(row.text) for row in rows] == [{"text": "x", "n": 1}, {"text": "y", "n": 2}]
    assert rows[1].origin == "csv[train]:2"


BROKEN = [
    ("empty.jsonl", b"", "empty.jsonl", "empty file", "no record"),
    ("blank.jsonl", b"\n \n", "blank.jsonl", "empty file", "no record"),
    ("empty.json", b"", "empty.json", "empty file", "no record"),
    ("none.json", b"[]", "none.json", "empty file", "no record"),
    ("empty.txt", b"", "empty.txt", "empty file", "no text"),
    ("blank.txt", b" \n\n", "blank.txt", "empty file", "no text"),
    ("gbk.jsonl", b'{"a": 1}\n{"a": "' + "发烧".encode("gbk") + b'"}\n', "gbk.jsonl:2", "encoding", "iconv"),
    (
        "gbk.json",
        b'[\n{"a": "' + "发烧".encode("gbk") + b'"}]\n',
        "gbk.json:2",
        "encoding",
        "not UTF-8 (0xb7 at byte 8)",
    ),
    ("gbk.txt", b"ok\n" + "发烧".encode("gbk"), "gbk.txt:2", "encoding", "at byte 1"),
    ("utf16.jsonl", '{"a": 1}'.encode("utf-16"), "utf16.jsonl:1", "encoding", "UTF-16; expected UTF-8"),
    ("nul.txt", b"a\nb\x00c\n", "nul.txt:2", "NUL character", "at position 2"),
    ("cut.json", b'[\n{"a": 1},\n{"a": ', "cut.json:3", "invalid JSON", "what follows is not read"),
    ("open.json", b'[{"a": 1},', "open.json:1", "invalid JSON", "a list without end"),
    ("comma.json", b'[{"a": 1}\n{"a": 2}]', "comma.json:1", "invalid JSON", "no comma after this record"),
    ("deep.json", b"[" + b"[" * 100_000, "deep.json:1", "invalid JSON", "nested too deeply"),
    ("cut.parquet", b"PAR1abc", "cut.parquet:1", "broken file", "expected a parquet file"),
]


@pytest.mark.parametrize(("name", "content", "origin", "reason", "words"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_file_is_told_with_its_line(write, tmp_path, name, content, origin, reason, words):
    _, faults = load(write(name, content))
    assert [fault.reason for fault in faults] == [reason]
    assert faults[0].origin == str(tmp_path / origin)
    assert words in str(faults[0]) or pytest.fail(str(faults[0]))


def test_whole_records_before_a_break_are_kept(write):
    assert load(write("a.json", '[{"a": 1},\n {"a": '))[0] == [(1, {"a": 1})]
    rows, faults = load(write("a.jsonl", b'{"a": 1}\n\xff\n{"a": 3}\n'))
    assert ([line for line, _ in rows], [fault.origin[-2:] for fault in faults]) == ([1, 3], [":2"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": "x', r"Unterminated string .*It ends too early"),
        ('{"a": 1', "It ends too early"),
        ("{'a': 1}", "Expecting property name .* at character 2"),
        ('{"a": "x\x00"}', "There is a NUL byte"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "cannot be read"),
        ("", "Expecting value"),
    ],
)
def test_invalid_json_says_where_it_breaks(text, words):
    with pytest.raises(DataError, match=words) as caught:
        parse_json(text, Place("a.jsonl:1"))
    assert caught.value.reason == "invalid JSON"


def test_a_line_of_ten_megabytes_is_read(write):
    rows, faults = load(write("a.jsonl", {"text": "水" * 3_500_000}, {"text": "x"}))
    assert [line for line, _ in rows] == [1, 2] and not faults
    assert len(rows[0][1]["text"]) == 3_500_000


@settings(max_examples=150)
@given(content=st.binary(max_size=60), suffix=st.sampled_from(["jsonl", "json", "txt", "parquet"]))
@example(content=b"[1, 2", suffix="json")
@example(content=b"\xef\xbb\xbf", suffix="jsonl")
@example(content=b"\r\r\n", suffix="txt")
def test_any_bytes_give_records_or_faults_and_never_another_error(write, content, suffix):
    faults = []
    for row in read([FileSource(write(f"fuzz.{suffix}", content))], faults.append):
        try:
            parse_json(row.text, Place(row.origin))
        except DataError as error:
            faults.append(error)
    assert all(isinstance(fault, DataError) for fault in faults)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(records=st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), min_size=1, max_size=4))
@example(records=[{"a": "\ud800"}])
def test_no_record_is_lost_or_changed_on_the_way(write, records):
    lines = write("r.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    listed = write("r.json", json.dumps(records, indent=2))
    for path in (lines, listed):
        rows, faults = load(path)
        if not all({"from", "value"} <= r.keys() or {"role", "content"} <= r.keys() for r in records):
            assert [row for _, row in rows] == records and not faults
