"""The committed tokenizer: any text, ChatML, short answers, and what the generator makes."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from datamodules.demo.__main__ import HERE, main
from datamodules.demo.corpus import corpus
from datamodules.demo.facts import ADVICE, AVOID, CONDITIONS, FINDINGS
from datamodules.demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

COMMITTED = HERE / "tokenizer"
LONGEST_ANSWER = 24


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(COMMITTED)


def merges(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]


def test_the_committed_tokenizer_is_what_the_command_makes(tokenizer, tmp_path, capsys):
    main(["tokenizer", "--out", str(tmp_path)])
    assert str(VOCAB_SIZE) in capsys.readouterr().out
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert merges(tmp_path) == merges(COMMITTED)
    assert made.chat_template == tokenizer.chat_template
    assert made.special_tokens_map == tokenizer.special_tokens_map


def test_special_tokens_are_four_distinct_single_tokens(tokenizer):
    ids = [tokenizer(token, add_special_tokens=False).input_ids for token in SPECIAL_TOKENS]
    assert [len(i) for i in ids] == [1, 1, 1, 1]
    assert len({i[0] for i in ids}) == 4
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == VOCAB_SIZE


@pytest.mark.parametrize(
    "text", ["This is flu.", " 两边有空格 ", "naïve 😀\n\tKölsch 漢字かな", "<|im_start", "a  b\r\n"]
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_nothing_is_added_around_a_text(tokenizer):
    assert not set(tokenizer("This is flu.").input_ids) & set(tokenizer.all_special_ids)


def test_the_template_is_chatml(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "A"},
    ]
    whole = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    prompt = whole.removesuffix("A<|im_end|>\n")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == whole
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == prompt


def test_answers_are_short(tokenizer):
    pairs = [json.loads(line) for line in corpus()["preference.train.jsonl"].decode().splitlines()]
    lengths = [len(tokenizer(pair["response_chosen"]).input_ids) for pair in pairs]
    assert max(lengths) <= LONGEST_ANSWER


def test_a_chinese_term_is_spelled_the_same_wherever_it_stands(tokenizer):
    terms = [*FINDINGS.values(), *ADVICE.values(), *AVOID.values(), *(c.name for c in CONDITIONS)]
    for term in terms:
        alone = tokenizer(term.zh).input_ids
        within = tokenizer(f"这是{term.zh}吗").input_ids
        assert any(within[i : i + len(alone)] == alone for i in range(len(within)))
