"""Documents are joined with EOS between them and cut in blocks; no token is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import PretrainDataModule
from datamodules.formats import readers


def load(path, tokenizer, block_size, **options):
    data = PretrainDataModule(train=path, tokenizer=tokenizer, block_size=block_size, **options)
    data.setup("fit")
    return data


def joined(examples):
    return [token for example in examples for token in example.branches[0].input_ids.tolist()]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_documents_are_joined_with_eos_between_and_not_after(write, tokenizer):
    path = write("a.jsonl", {"text": "one one"}, {"text": "two"}, {"text": "three 三"})
    data = load(path, tokenizer, 4)
    eos = [tokenizer.eos_token_id]
    expected = ids(tokenizer, "one one") + eos + ids(tokenizer, "two") + eos + ids(tokenizer, "three 三")
    assert joined(data.datasets["train"]) == expected
    assert set(data.datasets["train"].lengths[:-1]) == {4}


def test_a_text_file_is_one_document_and_files_are_several(write, tokenizer):
    paths = [write("a.txt", "one\n\ntwo\n"), write("b.txt", "three\n")]
    expected = [*ids(tokenizer, "one\n\ntwo\n"), tokenizer.eos_token_id, *ids(tokenizer, "three\n")]
    assert joined(load(paths, tokenizer, 5).datasets["train"]) == expected


@settings(max_examples=25)
@given(
    documents=st.lists(st.text("ab 三\n", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=5),
    block_size=st.integers(2, 9),
)
def test_every_token_stands_in_exactly_one_block(write, tokenizer, documents, block_size):
    path = write("a.jsonl", *[{"text": document} for document in documents])
    expected = [t for d in documents for t in [*ids(tokenizer, d), tokenizer.eos_token_id]][:-1]
    examples = None
    if len(expected) > 1:
        examples = load(path, tokenizer, block_size).datasets["train"]
        lone = len(expected) % block_size == 1
        assert joined(examples) == (expected[:-1] if lone else expected)
        assert all(len(e) == n for e, n in zip(examples, examples.lengths, strict=True))
        assert all(torch.all(e.branches[0].weights == 1) for e in examples)


def test_long_files_in_pieces_give_the_same_tokens(write, tokenizer, monkeypatch):
    text = "".join(f"Line {i}。 It goes on.\n" + "\n  indented\n" * (i % 3 == 0) for i in range(60))
    paths = [write("a.txt", text), write("b.txt", text)]
    whole = joined(load(paths, tokenizer, 16).datasets["train"])
    monkeypatch.setattr(readers, "PIECE", 100)
    other = load(paths, tokenizer, 16, cache_dir=str(paths[0]) + ".cache")
    assert len(other.datasets["train"].rows) > 10
    assert joined(other.datasets["train"]) == whole


def test_tokenizers_that_begin_texts_with_a_blank_take_them_whole(make_tokenizer, write, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 5)
    tokenizer = make_tokenizer("chatml", kind="sentence_piece")
    data = load(write("a.txt", "What is the capital?\nParis is the capital.\n"), tokenizer, 16)
    assert len(data.datasets["train"].rows) == 1


def test_the_last_blocks_of_a_single_document_are_held_out(write, tokenizer):
    text = " ".join(str(i) for i in range(200))
    path = write("a.txt", text)
    data = load(path, tokenizer, 10, validation=0.25)
    train, held_out = data.datasets["train"], data.datasets["validation"]
    assert joined(train) + joined(held_out) == ids(tokenizer, text)
    assert len(held_out) == round(0.25 * (len(train) + len(held_out)))
    assert [held_out[0].branches[0].input_ids.tolist()] == [joined(held_out)[:10]]
    with pytest.raises(ValueError, match="one document of one block"):
        load(path, tokenizer, 100_000, validation=0.25)


def test_held_out_documents_share_no_text_with_the_training_data(write, tokenizer):
    path = write("a.jsonl", *[{"text": f"document {i % 5}"} for i in range(20)])
    data = load(path, tokenizer, 4, validation=0.4)
    texts = [tokenizer.decode(joined(data.datasets[split])) for split in ("train", "validation")]
    numbers = [set(text) & set("01234") for text in texts]
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == set("01234")


def test_blocks_know_where_they_begin(write, tokenizer):
    path = write("a.jsonl", {"text": "one " * 9}, {"text": "two " * 9})
    examples = load(path, tokenizer, 4).datasets["train"]
    assert examples.origin(0) == f"{path}:1" and examples.origin(len(examples) - 1) == f"{path}:2"


def test_a_tokenizer_without_eos_is_refused(make_tokenizer, write):
    with pytest.raises(ValueError, match="no EOS token to put between documents"):
        load(write("a.txt", "x"), make_tokenizer("chatml", eos_token=None), 4)
