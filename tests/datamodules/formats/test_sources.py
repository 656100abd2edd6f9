"""Data arguments are files, folders, globs, lists and ids; what is not there is told with a way out."""

from __future__ import annotations

import pytest

from datamodules.formats import FileSource, HubSource, resolve


def names(spec):
    return [source.path.rsplit("/", 1)[-1] for source in resolve(spec)]


@pytest.fixture
def folder(write, tmp_path):
    for name in ("b.jsonl", "a.txt", "deep/c.parquet", "notes.md"):
        write(name, "x")
    return str(tmp_path)


def test_a_file_a_folder_a_glob_and_a_list_are_found(folder):
    assert names(f"{folder}/b.jsonl") == ["b.jsonl"]
    assert names(folder) == ["a.txt", "b.jsonl", "c.parquet"]
    assert names(f"{folder}/*.[jt]*") == ["a.txt", "b.jsonl"]
    assert names(f"{folder}/**/*.parquet") == ["c.parquet"]
    assert names([f"{folder}/b.jsonl", {"path": f"{folder}/a.txt"}]) == ["b.jsonl", "a.txt"]


def test_what_is_no_file_is_the_id_of_a_dataset():
    assert resolve("org/name") == (HubSource("org/name", "train", {}),)
    spec = {"path": "org/name", "name": "zh", "split": "test[:10]", "revision": None}
    assert resolve(spec) == (HubSource("org/name", "test[:10]", {"name": "zh"}),)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{folder}/b.json", r'there is no such file. Did you mean "b.jsonl"\?'),
        ("missing/b.jsonl", "the folder 'missing' does not exist either"),
        ("./data", "there is no such file"),
        ("{folder}/*.csv", "the pattern matches no file"),
        ("{folder}/deep/none", "there is no such file"),
        ([], "an empty list"),
        (3, "expected a path"),
        ({"pth": "x"}, "unknown field 'pth', .* Did you mean \"path\"?"),
        ({"name": "x"}, 'expected "path"'),
    ],
)
def test_what_cannot_be_found_is_told(folder, spec, words):
    with pytest.raises(ValueError, match=f"(?i){words}"):
        resolve(spec.format(folder=folder) if isinstance(spec, str) else spec)


def test_a_folder_without_data_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no file with one of \.txt"):
        resolve(str(tmp_path))


def test_an_id_that_cannot_be_loaded_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"'no-such/dataset' \(split 'train'\): it is neither a file"):
        HubSource("no-such/dataset").load()


def test_the_fingerprint_of_a_file_follows_its_content(write):
    source = FileSource(write("a.txt", "x"))
    before = source.fingerprint()
    write("a.txt", "y")
    assert source.fingerprint() != before
    write("a.txt", "x")
    assert source.fingerprint() == before
