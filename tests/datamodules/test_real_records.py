"""The data modules on real records: labels token by token, and the lines that are known to be bad."""

from __future__ import annotations

import json
import re

import pytest
import torch

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from datamodules.formats import DataError
from lit_align.batch import MicroBatch

pytestmark = pytest.mark.real_data
BUDGET = 200_000


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def open_data(module, path, tokenizer, **options):
    options = {"max_length": BUDGET} | options
    data = module(train=str(path), tokenizer=tokenizer, **options)
    data.setup("fit")
    return data


def chatml_by_hand(tokenizer, conversation):
    """Ids and labels from turns tokenised one by one: control tokens part them, so this is the same text's ids."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, labels = [], []
    for role, text, trained in conversation:
        header, body = encode(f"{role}\n"), encode(f"{role}\n{text}")
        # A blank at the start of a text may merge with the header's line break: that token is the answer's.
        shared = len(header) if body[: len(header)] == header else len(header) - 1
        ids += [start, *body, end, *encode("\n")]
        labels += [-100] * (1 + shared) + ([*body[shared:], end] if trained else [-100] * (len(body) - shared + 1))
        labels += [-100] * len(encode("\n"))
    return ids, labels


def turns_of(record):
    """(role, text, trained) of a record in the rendering that the data module uses where a template knows no tools."""
    roles = {
        "human": "user",
        "gpt": "assistant",
        "function_call": "assistant",
        "observation": "tool",
        "system": "system",
    }
    tools = json.loads(record["tools"]) if record.get("tools") else []
    head = 'Functions that may be called by answering {"name": ..., "arguments": {...}}:\n'
    text = head + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    turns = [("system", text, False)] if tools else []
    for message in record["conversations"]:
        turns.append((roles[message["from"]], message["value"], message["from"] in ("gpt", "function_call")))
    return turns


@pytest.mark.parametrize(("name", "count"), [("medical_sft", 800), ("sharegpt_zh", 298), ("toolcall_zh", 60)])
def test_labels_on_real_conversations_are_the_assistants_tokens(shared_data, tokenizer, name, count):
    path = shared_data / "sft" / f"{name}.jsonl"
    examples = open_data(SFTDataModule, path, tokenizer, on_error="skip").datasets["train"]
    lines = records(path)
    assert len(examples) == count
    for index in range(count):
        branch = examples[index].branches[0]
        record = lines[int(examples.origin(index).rpartition(":")[2]) - 1]
        ids, labels = chatml_by_hand(tokenizer, turns_of(record))
        assert branch.input_ids.tolist() == ids
        assert torch.where(branch.weights > 0, branch.input_ids, -100).tolist() == labels


def test_trained_tokens_of_real_conversations_spell_the_answers(shared_data, make_tokenizer):
    tokenizer = make_tokenizer("qwen25")
    path = shared_data / "sft" / "sharegpt_zh.jsonl"
    examples = open_data(SFTDataModule, path, tokenizer, on_error="skip").datasets["train"]
    lines = records(path)
    for index in range(len(examples)):
        branch = examples[index].branches[0]
        record = lines[int(examples.origin(index).rpartition(":")[2]) - 1]
        answers = [message["value"] + "<|im_end|>" for message in record["conversations"] if message["from"] == "gpt"]
        spelled = tokenizer.decode(branch.input_ids[branch.weights > 0])
        # A token may hold the line break before an answer that begins with one; else the texts are equal.
        assert spelled == "".join(answers) or re.sub(r"\s+", "", spelled) == re.sub(r"\s+", "", "".join(answers))


def test_tool_calls_of_real_records_go_through_a_template_that_knows_them(shared_data, make_tokenizer):
    tokenizer = make_tokenizer("qwen25")
    path = shared_data / "sft" / "toolcall_zh.jsonl"
    examples = open_data(SFTDataModule, path, tokenizer).datasets["train"]
    calls = 0
    for index, record in enumerate(records(path)):
        branch = examples[index].branches[0]
        spelled = tokenizer.decode(branch.input_ids[branch.weights > 0]).split("<|im_end|>")[:-1]
        trained = [message for message in record["conversations"] if message["from"] in ("gpt", "function_call")]
        for text, message in zip(spelled, trained, strict=True):
            if message["from"] == "gpt":
                assert text == message["value"]
            else:
                called = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text, re.DOTALL)[1]
                assert json.loads(called) == json.loads(message["value"])
                calls += 1
    assert calls == 47


def test_the_known_bad_lines_are_told_with_file_and_line(shared_data, tokenizer):
    path = shared_data / "sft" / "sharegpt_zh.jsonl"
    with pytest.raises(DataError) as caught:
        open_data(SFTDataModule, path, tokenizer)
    text = str(caught.value)
    assert text.startswith(f"{path}:59: conversations[2].value: found an empty text")
    assert f"{path}:119: conversations: found a conversation that ends with a user" in text
    assert "the first of 2 faults (1 empty field, 1 roles out of order)" in text
    skipped = open_data(SFTDataModule, path, tokenizer, on_error="skip").report.splits["train"].skipped
    assert skipped == {"empty field": 1, "roles out of order": 1}


def test_cut_real_conversations_fit_and_stay_trained(shared_data, tokenizer):
    path = shared_data / "sft" / "sharegpt_zh.jsonl"
    options = {"max_length": 256, "overlong": "truncate", "on_error": "skip"}
    examples = open_data(SFTDataModule, path, tokenizer, **options).datasets["train"]
    assert len(examples) == 298 and examples.lengths.max() == 256 and examples.trained_weights.min() >= 1


def test_both_forms_of_real_pairs_give_the_same_examples(shared_data, tokenizer):
    old = open_data(PreferenceDataModule, shared_data / "preference" / "dpo_zh.jsonl", tokenizer).datasets["train"]
    new_path = shared_data / "preference" / "dpo_zh_conversations.jsonl"
    new = open_data(PreferenceDataModule, new_path, tokenizer).datasets["train"]
    assert (len(old), len(new)) == (400, 60)

    def key(example):
        return tuple(tuple(ids.tolist()) for ids in (example.prefix_ids, *(b.input_ids for b in example.branches)))

    assert len({key(example) for example in new} & {key(example) for example in old}) == 60


def test_real_pairs_spell_question_and_answers(shared_data, tokenizer):
    path = shared_data / "preference" / "dpo_zh.jsonl"
    examples = open_data(PreferenceDataModule, path, tokenizer).datasets["train"]
    for example, record in zip(examples, records(path), strict=True):
        system = f"<|im_start|>system\n{record['system']}<|im_end|>\n" if record["system"] else ""
        asked = f"{system}<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(example.prefix_ids) == asked
        for branch, side in zip(example.branches, ("chosen", "rejected"), strict=True):
            assert tokenizer.decode(branch.input_ids) == record[f"response_{side}"] + "<|im_end|>"


def test_real_queries_carry_their_answers(shared_data, tokenizer):
    path = shared_data / "prompts" / "medical_qa.jsonl"
    examples = open_data(PromptDataModule, path, tokenizer).datasets["train"]
    for (ids, record), line in zip(examples, records(path), strict=True):
        assert record == line and line["question"] in tokenizer.decode(ids)


def test_real_text_is_cut_in_blocks_without_loss(shared_data, tokenizer):
    path = shared_data / "pretrain" / "fever.txt"
    data = PretrainDataModule(train=str(path), validation=0.1, tokenizer=tokenizer, block_size=512)
    data.setup("fit")
    parts = [e.branches[0].input_ids for split in ("train", "validation") for e in data.datasets[split]]
    assert tokenizer.decode(torch.cat(parts)) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_real_batches_score_exactly_the_trained_tokens(shared_data, tokenizer, layout):
    path = shared_data / "sft" / "medical_sft.jsonl"
    options = {"max_length": 512, "overlong": "truncate", "batch_size": 64, "layout": layout}
    data = open_data(SFTDataModule, path, tokenizer, **options)
    scored = 0
    for batch in data.train_dataloader():
        assert isinstance(batch, MicroBatch)
        scored += len(batch.scored)
    assert scored == data.report.splits["train"].trained == data.datasets["train"].trained_weights.sum()


@pytest.mark.smollm
def test_a_real_tokenizer_with_a_default_system_text_gives_the_same_labels(shared_data, smollm):
    path = shared_data / "sft" / "medical_sft.jsonl"
    data = open_data(SFTDataModule, path, str(smollm))
    default = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face", False)
    assert data.report.warnings == []
    for example, record in zip(data.datasets["train"], records(path), strict=True):
        ids, labels = chatml_by_hand(data.tokenizer, [default, *turns_of(record)])
        branch = example.branches[0]
        assert branch.input_ids.tolist() == ids
        assert torch.where(branch.weights > 0, branch.input_ids, -100).tolist() == labels
