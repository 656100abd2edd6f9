"""Prompts reach rollouts with the records they come from."""

from __future__ import annotations

import pytest
import torch

from datamodules import PromptDataModule
from datamodules.formats import DataError
from lit_align.batch import PromptBatch


@pytest.fixture
def load(write, tokenizer):
    def load(*records, **options):
        data = PromptDataModule(train=write("a.jsonl", *records), tokenizer=tokenizer, **options)
        data.setup("fit")
        return data

    return load


def test_batches_hold_prompts_and_records_as_they_were_read(load, tokenizer):
    records = [{"question": f"发烧{i}?", "answer": f"{i}", "meta": {"n": [i]}} for i in range(5)]
    seen = {}
    for batch in load(*records, batch_size=2).train_dataloader():
        assert isinstance(batch, PromptBatch) and len(batch) <= 2
        for ids, record, index in zip(batch.prompt_ids, batch.records, batch.indices.tolist(), strict=True):
            assert tokenizer.decode(ids) == f"<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n"
            seen[index] = record
    assert [seen[i] for i in range(5)] == records


def test_a_bare_list_of_messages_is_passed_on_as_a_conversation(load):
    turns = [{"from": "human", "value": "Hi"}]
    assert load(turns).datasets["train"][0][1] == {"conversations": turns}


def test_the_stage_may_put_a_collector_before_the_loader(load):
    data = load({"question": "a"}, {"question": "b"}, batch_size=1)

    class Rollouts:
        def __init__(self, loader):
            self.loader = loader

        def state_dict(self):
            return {"prompts": self.loader.state_dict()}

    data.collector = Rollouts
    rollouts = data.train_dataloader()
    next(iter(rollouts.loader))
    assert data.state_dict()["cursor"] == {"prompts": {"epoch": 0, "step": 1}}


def test_a_long_prompt_keeps_its_end(load):
    record = {"question": "word " * 100}
    with pytest.raises(DataError, match=r"found a prompt of \d+ tokens; expected at most 20"):
        load(record, max_length=20)
    whole, cut = load(record).datasets["train"][0][0], load(record, max_length=20, overlong="truncate")
    assert torch.equal(cut.datasets["train"][0][0], whole[-20:])
    assert cut.report.splits["train"].cut == {"prompt cut at its start": 1}


def test_an_empty_micro_batch_is_a_batch_of_no_prompts(load):
    data = load({"question": "a"})
    data.datasets["validation"] = data.datasets["train"]
    loader = data.loader("validation")
    loader.world_size, loader.rank = 2, 1
    (batch,) = loader
    assert len(batch) == 0 and batch.to("cpu").indices.shape == (0,)
