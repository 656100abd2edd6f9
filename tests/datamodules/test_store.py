"""Data is tokenised once; what changes anything about the rows makes them anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules import SFTDataModule, store
from datamodules.formats import DataError


def talk(question, answer="yes"):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def start(path, tokenizer, **options):
    data = SFTDataModule(train=path, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def entries(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "data").iterdir())


@pytest.fixture
def path(write):
    return write("a.jsonl", *[talk(f"question {i}") for i in range(6)])


def test_a_second_start_tokenises_nothing_and_says_so(path, tokenizer, monkeypatch):
    first = start(path, tokenizer)
    monkeypatch.setattr(store, "_build", lambda *_: pytest.fail("tokenised again"))
    second = start(path, tokenizer)
    assert "nothing tokenised" not in str(first.report) and "nothing tokenised" in str(second.report)
    assert [e.branches[0].input_ids.tolist() for e in first.datasets["train"]] == [
        e.branches[0].input_ids.tolist() for e in second.datasets["train"]
    ]
    assert first.identity() == second.identity()


def digest(data):
    return tuple(sorted(data.identity().items()))


def test_data_tokenizer_template_and_settings_are_in_the_key(path, tokenizer, make_tokenizer, write, tmp_path):
    keys = {digest(start(path, tokenizer))}
    keys.add(digest(start(path, tokenizer, max_length=512)))
    keys.add(digest(start(path, tokenizer, train_on="last")))
    keys.add(digest(start(path, make_tokenizer("llama3"))))
    write("a.jsonl", *[talk(f"question {i}") for i in range(7)])
    keys.add(digest(start(path, tokenizer)))
    assert len(keys) == 5 == len(entries(tmp_path))


def test_worker_processes_give_the_same_rows(path, tokenizer, tmp_path):
    one = start(path, tokenizer, cache_dir=str(tmp_path / "one"))
    two = start(path, tokenizer, cache_dir=str(tmp_path / "two"), num_proc=2)
    assert [e.branches[0].input_ids.tolist() for e in one.datasets["train"]] == [
        e.branches[0].input_ids.tolist() for e in two.datasets["train"]
    ]


def test_a_failed_start_leaves_nothing_behind(path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "keep", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(path, tokenizer)
    assert entries(tmp_path) == []


def test_all_faults_are_told_at_once_with_file_and_line(write, tokenizer):
    path = write("a.jsonl", talk("ok"), talk(""), {"conversation": []}, talk("x" * 5000))
    with pytest.raises(DataError) as caught:
        start(path, tokenizer)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: conversations[0].value: found an empty text")
    assert "the first of 3 faults (1 empty field, 1 missing field, 1 overlong)" in text
    assert f"{path}:3: found no conversation" in text and f"{path}:4: found an example of" in text


def test_faults_reach_the_user_from_worker_processes(write, tokenizer):
    path = write("a.jsonl", talk("ok"), talk("a"), talk("b"), talk(""))
    with pytest.raises(DataError, match=r"a\.jsonl:4: conversations\[0\]\.value"):
        start(path, tokenizer, num_proc=2)


def test_skipped_dropped_and_cut_records_are_counted_by_reason(write, tokenizer):
    bad = '{"conversations": [\n'
    records = [
        talk("ok"),
        talk(""),
        talk("", "b"),
        talk("x" * 5000),
        talk("so", "y" * 5000),
        talk("same"),
        talk("same"),
    ]
    path = write("a.jsonl", bad + "".join(json.dumps(record) + "\n" for record in records))
    other = write("b.jsonl", b"\xff\n")
    dropped = start([path, other], tokenizer, on_error="skip", overlong="drop").report.splits["train"]
    assert dropped.skipped == {"invalid JSON": 1, "empty field": 2, "encoding": 1}
    assert dropped.dropped == {"overlong": 2}
    assert (dropped.records, dropped.examples) == (9, 3)
    assert len(dropped.faults) == 4 and dropped.faults[0].startswith(f"{other}:1: found a byte")
    cut = start([path, other], tokenizer, on_error="skip", overlong="truncate")
    report = cut.report.splits["train"]
    assert report.cut == {"prompt cut at its start": 1, "response cut at its end": 1}
    assert (report.dropped, report.examples) == ({}, 5)
    assert max(len(example) for example in cut.datasets["train"]) == 1024
    assert json.loads(json.dumps(cut.report.as_dict()))["splits"]["train"]["cut"] == dict(report.cut)
    assert "skipped: 2 (empty field), 1 (encoding), 1 (invalid JSON) of 9 records" in str(cut.report)


def test_counts_come_back_from_the_cache(write, tokenizer):
    path = write("a.jsonl", talk("ok"), talk(""))
    first, second = (start(path, tokenizer, on_error="skip").report.splits["train"] for _ in range(2))
    assert second.cached and not first.cached
    assert (second.skipped, second.faults) == (first.skipped, first.faults) == ({"empty field": 1}, first.faults)


def test_a_source_without_a_usable_record_is_refused(write, tokenizer):
    with pytest.raises(ValueError, match=r"no record of .*a\.jsonl can be used: .*skipped: 1 \(empty field\)"):
        start(write("a.jsonl", talk("")), tokenizer, on_error="skip")
    with pytest.raises(ValueError, match=r"b\.jsonl: found no record; expected at least one"):
        start(write("b.jsonl", ""), tokenizer)


def test_rows_are_kept_where_the_user_says(path, tokenizer, tmp_path, monkeypatch):
    assert store.cache_folder("~/x") == Path.home() / "x" / "data"
    assert store.cache_folder() == tmp_path / "cache" / "data"
    monkeypatch.delenv("LIT_ALIGN_CACHE")
    assert store.cache_folder() == Path.home() / ".cache" / "lit_align" / "data"
