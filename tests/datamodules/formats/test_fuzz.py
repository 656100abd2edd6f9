"""Whatever stands in a file: records, or faults with file and line; no other error, no hang, nothing lost."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from datamodules.formats import DataError, FileSource, Place, read, resolve
from datamodules.formats.fields import MAX_DEPTH, parse_json
from datamodules.store import Guard

pytestmark = pytest.mark.timeout(120)
quick = settings(max_examples=150)

RECORDS = [{"text": "发烧é"}, {"text": 'a "b" \\ \n c', "n": [1, {"m": None}]}, {"text": "\U0001f600"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def load(path):
    """Records (or the faults that parsing them gives), and the faults of the file."""
    faults, records = [], []
    for raw in read([FileSource(path)], faults.append):
        assert raw.origin.rpartition(":")[2].isdigit()
        try:
            records.append(parse_json(raw.text, Place(raw.origin)))
        except DataError as error:
            faults.append(error)
    assert all(
        type(fault) is DataError and path.encode("utf-8", "replace")[:4] in str(fault).encode() for fault in faults
    )
    return records, faults


def lines_with_content(data: bytes) -> int:
    """By hand: what stands between line feeds and is more than blanks, a byte order mark at the start left out."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return sum(bool(line.decode("utf-8", "replace").strip()) for line in lines)


def in_order(records, originals):
    """Whether the records stand among the originals, in the same order."""
    rest = iter(originals)
    return all(any(record == original for original in rest) for record in records)


def parquet(path, records=RECORDS):
    pq.write_table(pa.table({"text": [record["text"] for record in records]}), path, compression="none")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "list.json", "parquet", "txt"])
def test_a_file_cut_at_any_byte_gives_whole_records_and_tells_of_the_rest(write, tmp_path, suffix):
    path = str(tmp_path / f"a.{suffix}")
    if suffix == "parquet":
        parquet(path)
    else:
        write(f"a.{suffix}", json.dumps(RECORDS, indent=1) if suffix == "list.json" else LINES)
    whole = Path(path).read_bytes()
    originals, faults = load(path)
    assert not faults and (suffix == "txt" or [r["text"] for r in originals] == [r["text"] for r in RECORDS])
    for size in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:size])
        records, faults = load(path)
        if suffix == "txt":
            assert len(records) + len(faults) == 1
            assert not records or whole.decode().startswith(records[0]["text"])
            continue
        assert in_order(records, originals)
        if suffix == "jsonl":
            assert len(records) + len(faults) == max(lines_with_content(whole[:size]), 1)  # an empty file is a fault
        else:
            whole_records = suffix == "json" and whole[:size].rstrip() in (LINES[: LINES.find("}\n", i) + 1].encode()
                                                                           for i in range(len(LINES) - 1))  # fmt: skip
            assert len(faults) == (0 if whole_records else 1)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "list.json", "txt"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "latin-1", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-7"],
)
def test_another_encoding_is_refused_and_never_taken_for_text(write, suffix, ends, encoding):
    records = [{"text": "é" if encoding == "latin-1" else "发烧é"}, {"text": "b"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    content = ends.join(["[", lines[0] + ",", lines[1], "]", ""] if suffix == "list.json" else [*lines, ""])
    data = content.encode(encoding)
    got, faults = load(write(f"a.{suffix}", data))
    if encoding.startswith("utf-8"):
        one_line = suffix == "jsonl" and ends == "\r"  # two records in what is one line here
        assert not one_line or "carriage returns alone" in str(faults[0])
        assert (len(faults) == 1) if one_line else (not faults)
        assert one_line or got == (records if suffix != "txt" else [{"text": "\n".join([*lines, ""])}])
        return
    if encoding == "utf-7":  # plain ASCII: no one can know
        return
    assert faults and not any(record in records[:1] for record in got)
    assert all(record in records for record in got) and (suffix != "txt" or not got)
    if suffix == "jsonl":
        assert len(got) + len(faults) == lines_with_content(data)


MARKS = [
    b"\n",
    b"\r",
    b"\r\n",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xff",
    b" ",
    b"[",
    b"]",
    b",",
    b'{"a": 1}',
    b'{"a": "\\ud800"}',
]


@quick
@given(parts=st.lists(st.sampled_from(MARKS) | st.binary(max_size=3), max_size=12))
@example(parts=[b'[{"a": 1}]', b'{"a": 2}'])
@example(parts=[b'{"a": 1}', b"\r", b'{"a": 1}'])
def test_no_line_is_lost_in_silence(write, parts):
    data = b"".join(parts)
    records, faults = load(write("fuzz.jsonl", data))
    assert len(records) + len(faults) == max(lines_with_content(data), 1)
    faults = []
    texts = [raw.text for raw in read([FileSource(write("fuzz.json", data))], faults.append)]
    whole = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").strip()
    if not faults and whole[0] == "[":
        assert [json.loads(text) for text in texts] == json.loads(whole.replace(",]", "]"))
    elif not faults:
        assert "".join("".join(texts).split()) == "".join(whole.split())
    load(write("fuzz.parquet", data))
    documents, faults = load(write("fuzz.txt", data))
    assert len(documents) + len(faults) == 1


@pytest.mark.parametrize(
    ("content", "records", "words"),
    [
        ('[{"a": 1}] {"a": 2}', 1, "text after the end of the list"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, "fuzz.json:1: found text after the end"),
        ('[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"fr', 0, "what follows is not read"),
        ('[{"a": 1}]]', 1, "text after"),
        ('[\n\n{"a": 1}\n\n', 1, "fuzz.json:3: found no comma after this record"),
        ('[\n\n{"a": 1},\n\n', 1, "fuzz.json:5: found a list without end"),
        (b'{"a": 1}\n\xff', 1, "What follows is not read"),
    ],
)
def test_what_a_json_file_holds_after_its_records_is_told(write, content, records, words):
    got, faults = load(write("fuzz.json", content))
    assert (len(got), len(faults)) == (records, 1)
    assert words in str(faults[0])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_files_that_the_system_refuses_are_faults_with_their_name(tmp_path, name):
    path = tmp_path / name
    os.symlink("/proc/self/mem", path)  # it opens, and cannot be read: an input/output error
    if not path.exists():
        pytest.skip("needs /proc")
    _, faults = load(str(path))
    assert [fault.origin.removesuffix(":1") for fault in faults] == [str(path)]
    with pytest.raises(DataError, match=r"found a file that cannot be read .*; expected a file to read"):
        FileSource(str(path)).fingerprint()
    path.unlink()
    assert load(str(path))[1]  # gone since it was found
    path.mkdir()
    assert load(str(path))[1]  # a folder


@pytest.mark.parametrize("spec", ["", " ", "a\0b", "a\0*/b", "x" * 5000 + ".jsonl", "~nobody-of-this-name/a.jsonl"])
def test_names_that_can_be_no_file_are_refused(spec):
    with pytest.raises(ValueError, match="data source"):
        resolve(spec)


def test_what_is_no_plain_file_is_not_there(tmp_path):
    os.symlink(tmp_path / "nothing", tmp_path / "broken.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("broken.jsonl", "pipe.jsonl"):
        with pytest.raises(ValueError, match="there is no such file"):
            resolve(str(tmp_path / name))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        resolve(str(tmp_path / "folder.jsonl"))


ODD_NAMES = [
    b"a\xff.jsonl",
    b"a\nb.jsonl",
    b"[x]*.jsonl",
    b"a:1.jsonl",
    "名 字.jsonl".encode(),
    b"%s{0}.jsonl",
    b"'\".jsonl",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_with_odd_names_are_read_and_named(tmp_path, tokenizer, name):
    (tmp_path / "folder").mkdir()
    path = os.path.join(os.fsencode(tmp_path), b"folder", name)
    with open(path, "w") as file:
        file.write(json.dumps({"question": "a", "answer": "b"}) + "\n{\n")
    for spec in (os.fsdecode(path), str(tmp_path / "folder")):
        data = SFTDataModule(train=spec, tokenizer=tokenizer, on_error="skip")
        data.setup("fit")
        report = data.report.splits["train"]
        assert (report.records, report.examples, sum(report.skipped.values())) == (2, 1, 1)
        assert (
            data.datasets["train"].origin(0).endswith(".jsonl:1") and ".jsonl:2: " in str(data.report).encode().decode()
        )


def test_parquet_bytes_are_text_or_a_fault_and_one_bad_row_costs_no_other(tmp_path):
    path = str(tmp_path / "a.parquet")
    column = pa.array([b"one", "水".encode(), b"\xff", b"four"])
    pq.write_table(pa.table({"text": column}), path)
    records, faults = load(path)
    assert records == [{"text": "one"}, {"text": "水"}, {"text": "four"}]
    assert [fault.origin for fault in faults] == [f"{path}:3"]
    broken = pa.Array.from_buffers(pa.string(), 4, column.buffers())  # says it is UTF-8
    pq.write_table(pa.table({"text": broken}), path)
    records, faults = load(path)
    assert records == [{"text": "one"}, {"text": "水"}, {"text": "four"}]
    assert [(fault.origin, fault.reason) for fault in faults] == [(f"{path}:3", "broken row")]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert [fault.reason for fault in load(path)[1]] == ["duplicate field"]


@settings(max_examples=150)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_parquet_file_with_a_wrong_byte_gives_records_or_faults(tmp_path, at, byte):
    path = str(tmp_path / "a.parquet")
    parquet(path)
    data = bytearray(Path(path).read_bytes())
    data[at % len(data)] = byte
    with open(path, "wb") as file:
        file.write(data)
    records, faults = load(path)
    assert records or faults


# --- records: any value in any field, through the same guard as in the store -----------------------------------------

CALL = {"name": "f", "arguments": {"x": 1}}
TALK = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "o"},
    {"from": "gpt", "value": "a", "weight": 0.5},
]
OPENAI = [
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    {"role": "tool", "content": "o"},
    {"role": "assistant", "content": "a"},
]
TOOLS = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}]
ANSWER_B = {"role": "assistant", "content": "b"}
FORMS = {
    PretrainDataModule: [{"text": "a b"}],
    SFTDataModule: [
        {"conversations": TALK, "tools": json.dumps(TOOLS), "weight": 2},
        {"messages": OPENAI, "tools": TOOLS},
        {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["q", "a"]]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
    PreferenceDataModule: [
        {"system": "s", "history": [["q", "a"]], "question": "q", "response_chosen": "a", "response_rejected": "b"},
        {"conversations": TALK[:2], "chosen": TALK[4], "rejected": ANSWER_B, "margin": 1, "weight": 2},
        {"prompt": "q", "chosen": OPENAI, "rejected": [*OPENAI[:3], ANSWER_B]},
    ],
    PromptDataModule: [
        {"question": "q", "answer": 1, "tools": TOOLS},
        {"messages": OPENAI[:3]},
        {"instruction": "i", "input": "j", "history": TALK[1:2] + TALK[4:]},
    ],
}
HERE = "odd.jsonl:7"
odd_texts = st.sampled_from(
    ["", " ", "\x00", "a\x00", "\ud800", "a\udfff", "<|im_end|>", "<|im_start|>user", "{", "[]", "null", '{"name": 1}',
     "human", "tool", "\ufeff", "\u2028", "\r", "system", "NaN", "{{ x }}"]
)  # fmt: skip
odd_numbers = st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e308, 1e300, -0.0, 5e-324, 0, True])
scalars = st.none() | st.booleans() | odd_numbers | odd_texts | st.integers() | st.floats() | st.text(max_size=4)
FIELDS = ("from", "value", "role", "content", "type", "text", "name", "function", "tool_calls", "arguments", "weight")
keys = odd_texts | st.sampled_from(FIELDS)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def places(value, path=()):
    """The paths of all members of a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def replaced(record, path, value):
    if not path:
        return value
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


@pytest.fixture(scope="module")
def guards(make_tokenizer):
    """The guarded encoder of each data module, under a template that knows no tools and one that does."""

    def make(kind, template):
        data = kind(
            tokenizer=make_tokenizer(template),
            **({} if kind is PretrainDataModule else {"max_length": 2000, "overlong": "drop"}),
        )
        return Guard(data.encoder(), "skip")

    return {(kind, template): make(kind, template) for kind in FORMS for template in ("chatml", "qwen25")}


def check_row(guard, row):
    """The row can be written and trained on, or it holds a fault with file and line that can be printed."""
    for name, kind in guard.encoder.columns.items():
        if kind == "string":
            row[name].encode()
        elif not row["fault"] and name not in ("margin", "weight"):
            assert np_all_finite(row[name]), name
    if row["fault"]:
        text = str(DataError.load(row["fault"]))
        assert text.startswith(HERE) and len(text.encode()) < 4000
    else:
        assert row["origin"] == HERE
    return row


def np_all_finite(value):
    import numpy as np

    return bool(np.isfinite(np.asarray(value, dtype=np.float64)).all())


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.__name__)
def test_records_as_they_should_be_make_rows(guards, kind):
    for record in FORMS[kind]:
        for template in ("chatml", "qwen25"):
            row = guards[kind, template]({"text": json.dumps(record), "origin": HERE, "continues": False, "source": 0})
            assert check_row(guards[kind, template], row)["fault"] == ""


@pytest.mark.parametrize("template", ["chatml", "qwen25"])
@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.__name__)
@settings(quick, max_examples=250)
@given(data=st.data())
def test_any_value_in_any_field_makes_a_row_or_a_fault(guards, kind, template, data):
    record = data.draw(st.sampled_from(FORMS[kind]))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(record))))
        record = replaced(record, path, data.draw(values))
    guard = guards[kind, template]
    check_row(guard, guard({"text": json.dumps(record), "origin": HERE, "continues": False, "source": 0}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e300", "1e7", "-1e7", "1" + "0" * 400, "1e999"])
@pytest.mark.parametrize(
    ("kind", "record", "field"),
    [
        (SFTDataModule, '{"question": "q", "answer": "a", "weight": N}', "weight"),
        (SFTDataModule, '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": N}]', "[1].weight"),
        (PreferenceDataModule, '{"question": "q", "chosen": "a", "rejected": "b", "weight": N}', "weight"),
        (PreferenceDataModule, '{"question": "q", "chosen": "a", "rejected": "b", "margin": N}', "margin"),
    ],
)
def test_numbers_that_would_make_a_loss_infinite_are_refused(guards, kind, record, field, number):
    guard = guards[kind, "chatml"]
    row = guard({"text": record.replace("N", number), "origin": HERE, "continues": False, "source": 0})
    fault = DataError.load(check_row(guard, row)["fault"])
    assert fault.reason == "wrong value" and fault.field.endswith(field)


def test_a_question_that_stands_beside_conversations_without_one_is_a_fault(guards):
    turns = [{"role": "system", "content": "s"}]
    sides = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    guard = guards[PreferenceDataModule, "chatml"]
    row = guard({"text": json.dumps({"prompt": "q", **sides}), "origin": HERE, "continues": False, "source": 0})
    assert "the question that chosen and rejected begin with" in check_row(guard, row)["fault"]


@pytest.mark.parametrize("depth", [50, MAX_DEPTH - 1, MAX_DEPTH + 1, 500, 970, 3000, 100_000])
@pytest.mark.parametrize(("opens", "closes"), ["[]", ('{"a":', "}")])
@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.__name__)
def test_nesting_of_any_depth_makes_a_row_or_a_fault(guards, kind, opens, closes, depth):
    deep = opens * depth + "1" + closes * depth
    guard = guards[kind, "qwen25"]
    for record in FORMS[kind]:
        for path in places(record):
            if not path or len(path) < 3:
                text = json.dumps(replaced({**record, "more": 0}, path or ("more",), "DEEP"))
                for inner in (deep, json.dumps(deep)):
                    row = guard(
                        {"text": text.replace('"DEEP"', inner), "origin": HERE, "continues": False, "source": 0}
                    )
                    check_row(guard, row)
                    assert depth <= MAX_DEPTH or inner != deep or "too deeply" in row["fault"]


LONG = 10_000_000


@pytest.mark.parametrize(
    "text",
    [
        '{"conversations": [{"from": "' + "x" * LONG + '", "value": "a"}]}',
        '{"conversations": [{"' + "x" * LONG + '": "a"}]}',
        '{"conversations": ' + " " * LONG + "3}",
        '{"conversations": ' + "1" * LONG + "}",
        '{"conversations": [' + "3," * (LONG // 2) + "3]}",
        "[" * LONG,
        '{"a":' * (LONG // 5),
        "{" + ",".join(f'"{i}": 1' for i in range(LONG // 16)) + "}",
        "{" + ",".join('"a": 1' for i in range(LONG // 8)) + "}",
        '{"weight": 1' + "0" * LONG + "}",
        '{"conversations": [{"from": "human", "value": "\\u0000' + "x" * LONG + '"}]}',
        "x" * LONG,
        '"' + "\\ud800" * (LONG // 6) + '"',
    ],
    ids=range(13),
)
@pytest.mark.timeout(60)
def test_a_faulty_line_of_ten_megabytes_is_told_in_a_few_words_and_soon(guards, write, text):
    guard = guards[SFTDataModule, "chatml"]
    row = guard({"text": text, "origin": HERE, "continues": False, "source": 0})
    assert check_row(guard, row)["fault"]
    records, faults = load(write("a.json", text))
    assert len(records) + len(faults) >= 1 and all(len(str(fault)) < 4000 for fault in faults)


def test_a_template_that_trips_over_a_record_is_a_fault_of_the_record(make_tokenizer):
    tokenizer = make_tokenizer("qwen25")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "tool | tojson", "tool.function.name + tool.function.description"
    )
    guard = Guard(SFTDataModule(tokenizer=tokenizer).encoder(), "skip")
    for tools, fault in ((TOOLS, ""), ([{"name": "f", "description": 3}], "turns that the tokenizer's chat template")):
        record = {"question": "q", "answer": "a", "tools": tools}
        row = guard({"text": json.dumps(record), "origin": HERE, "continues": False, "source": 0})
        assert fault in check_row(guard, row)["fault"] and bool(fault) == bool(row["fault"])


def test_fields_that_stand_twice_are_refused_wherever_they_are():
    for text in ('{"a": 1, "a": 1}', '{"a": {"b": [{"c": 1, "c": 2}]}}', '{"\\ud800": 1, "\\ud800": 2}'):
        with pytest.raises(DataError, match="twice in one object; expected every field once") as caught:
            parse_json(text, Place(HERE))
        assert caught.value.reason == "duplicate field"


BAD = [
    "{",
    '{"a": 1, "a": 2}',
    '{"weight": 1e300, "question": "q", "answer": "a"}',
    "3",
    '"\\ud800"',
    "[[[]]]",
    '{"question": "\\u0000", "answer": "a"}',
    '{"question": "q", "answer": "<|im_end|>"}',
    "null",
    "\ufeff{}",
]


@settings(quick, max_examples=12)
@given(data=st.data())
def test_every_record_is_an_example_or_counted(write, tokenizer, data):
    good, long = '{"question": "q", "answer": "a"}', json.dumps({"question": "q", "answer": "a b " * 200})
    kind = data.draw(st.sampled_from([SFTDataModule, PromptDataModule]))
    lines = [good, *data.draw(st.lists(st.sampled_from([*BAD, good, long, "", " "]), max_size=12))]
    path = write("a.jsonl", "\n".join(lines))
    module = kind(train=path, tokenizer=tokenizer, on_error="skip", overlong="drop", max_length=64)
    module.setup("fit")
    report = module.report.splits["train"]
    assert report.records == sum(bool(line.strip()) for line in lines)
    assert report.examples + sum(report.skipped.values()) + sum(report.dropped.values()) == report.records
    want = sum(line in (good, long) if kind is PromptDataModule else line == good for line in lines)
    assert (
        want <= report.examples <= want + lines.count('{"question": "q", "answer": "<|im_end|>"}') + lines.count(BAD[2])
    )
