"""The padded dictionaries of each stage, on the example records of the document that the project implements."""

from __future__ import annotations

import json

import pytest
import torch

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule

TEXT = """第一章论
传染病是指由病原微生物,如朊粒、病毒、衣原体、立克次体、支原体(mycoplasma)细菌真菌、螺旋体和寄生虫,如原虫、蠕虫、医学昆虫感染人体后产生的有传染性、在一定条件下可造成流行的疾病。感染性疾病是指由病原体感染所致的疾病,包括传染病和非传染性感染性疾病。
传染病学是一门研究各种传染病在人体内外发生、发展、传播、诊断、治疗和预防规律的学科。重点研究各种传染病的发病机制、临床表现、诊断和治疗方法,同时兼顾流行病学和预防措施的研究,做到防治结合。
传染病学与其他学科有密切联系,其基础学科和相关学科包括病原生物学、分子生物学、免疫学、人体寄生虫学、流行病学、病理学、药理学和诊断学等。掌握这些学科的基本知识、基本理论和基本技能对学好传染病学起着非常重要的作用。
"""
CONVERSATION = [
    {
        "from": "human",
        "value": "两只脚明显大小不一样,腿也不一样粗,该怎么办,两只脚明显大小不一样,腿也不一样粗,该怎么办,需要做什么检查",
    },
    {
        "from": "gpt",
        "value": ",与走路姿势没有关系的,人的器官,没有完全对称的,只是有的不是很明显的,这很正常的,只要健康就好。只有手术能纠正的。",  # noqa: E501
    },
]
PAIR = {
    "history": [],
    "question": '在这个任务中,你将会看到一个用中文提出的问题,有多个可能的答案。你需要根据你的常识知识,在"A""、"B"、"C"、"D"和"E"中选择一个最合适的选项。\n\n让我给你举个例子:问题:牙科诊所处理了很多口外伤的患者,这些患者来自哪里? \n选项:(A) 城镇 (B) 密西根 (C) 办公楼 (D) 医院 (E) 学校 \n这个例子的答案可能是:D\n原因是:这是正确答案,因为创伤性伤害通常由医院处理。\n\n好的,解决这个问题:\n问题:爱因斯坦认定能量是由什么构成的? \n选项:A 弱点 B 打球 C 大量 D 熵 E 事情 \n答案:',  # noqa: E501
    "response_chosen": "当然,我很乐意帮忙!这是我的答案:\n\n正确答案是C) 大量。\n\n爱因斯坦的相对论表明,能量由大量的小粒子组成,比如光子和电子,它们是能量的基本单位。这个观点挑战了传统对能量作为单一统一物质的理解,而是提出能量由许多更小、更离散的组成部分构成。",  # noqa: E501
    "response_rejected": '根据我的理解,这个问题的答案是"B" 打球。在物理学中,能量被定义为执行工作的能力。在这个语境中,"能量"(nenglian)可以被翻译为"energy"。"爱因斯坦"(Aìyīnésà)是一位著名的物理学家,他在相对论理论中引入了"能量"(nenglian)和"强量"(qīngliang)的概念。因此,"能量"(nenglian)由"能"(ne ng)表示"力量"或"能力",以及"量"(liang)表示"数量"或"量"组成。"B" 打球指的是以移动物体的形式存在的能量概念,具体来说是指球被球棒击中的形式。',  # noqa: E501
    "system": "",
}
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    + PAIR["question"]
    + "<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("qwen25")


def load(module, path, tokenizer, **options):
    data = module(train=path, tokenizer=tokenizer, **options)
    data.setup("fit")
    return data


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pt_blocks_of_1024_are_labels_of_themselves(write, tokenizer):
    data = load(PretrainDataModule, write("fever.txt", TEXT * 3), tokenizer)
    block = data.dictionaries([0])
    assert list(block) == ["input_ids", "attention_mask", "labels"]
    assert block["input_ids"].tolist() == [encode(tokenizer, TEXT * 3)[:1024]]
    assert block["attention_mask"].tolist() == [[1] * 1024]
    assert torch.equal(block["labels"], block["input_ids"])


def test_sft_examples_mask_the_question_and_the_padding_before_it(write, tokenizer):
    path = write("sft.json", json.dumps(CONVERSATION))
    data = load(SFTDataModule, path, tokenizer, padding_side="left")
    example = data.dictionaries([0], pad_to=8192)
    assert list(example) == ["input_ids", "attention_mask", "labels"]
    assert all(tensor.shape == (1, 8192) and tensor.dtype == torch.int64 for tensor in example.values())
    text = PROMPT.replace(PAIR["question"], CONVERSATION[0]["value"]) + CONVERSATION[1]["value"] + "<|im_end|>\n"
    ids, answer = encode(tokenizer, text), encode(tokenizer, CONVERSATION[1]["value"] + "<|im_end|>")
    padding = 8192 - len(ids)
    assert example["input_ids"][0, padding:].tolist() == ids
    assert example["attention_mask"][0].tolist() == [0] * padding + [1] * len(ids)
    assert example["labels"][0].tolist() == [-100] * (8192 - len(answer) - 1) + answer + [-100]
    with pytest.raises(ValueError, match=f"pad_to: expected at least {len(ids)}"):
        data.dictionaries([0], pad_to=10)


@pytest.fixture
def pairs(write, tokenizer):
    short = {"question": "发烧?", "chosen": "多喝水", "rejected": "不知道怎么办"}
    return load(PreferenceDataModule, write("pairs.jsonl", PAIR, short), tokenizer, max_length=4096)


def test_rm_pairs_are_prompt_and_answer_in_one_row(pairs, tokenizer):
    pair = pairs.dictionaries([0], form="reward")
    assert list(pair) == ["input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected"]
    for side in ("chosen", "rejected"):
        ids = encode(tokenizer, PROMPT) + encode(tokenizer, PAIR[f"response_{side}"] + "<|im_end|>")
        assert pair[f"input_ids_{side}"].tolist() == [ids]
        assert pair[f"attention_mask_{side}"].tolist() == [[1] * len(ids)]


def test_dpo_pairs_have_texts_ids_masks_and_labels(pairs, tokenizer):
    pair = pairs.dictionaries([0])
    assert list(pair) == [
        "prompt",
        "chosen",
        "rejected",
        "chosen_input_ids",
        "chosen_attention_mask",
        "chosen_labels",
        "rejected_input_ids",
        "rejected_attention_mask",
        "rejected_labels",
        "prompt_input_ids",
        "prompt_attention_mask",
    ]
    assert (pair["prompt"], pair["chosen"]) == ([PROMPT], [PAIR["response_chosen"]])
    prompt = encode(tokenizer, PROMPT)
    assert pair["prompt_input_ids"].tolist() == [prompt]
    assert pair["prompt_attention_mask"].tolist() == [[1] * len(prompt)]
    for side in ("chosen", "rejected"):
        answer = encode(tokenizer, PAIR[f"response_{side}"] + "<|im_end|>")
        assert pair[side] == [PAIR[f"response_{side}"]]
        assert pair[f"{side}_input_ids"].tolist() == [prompt + answer]
        assert pair[f"{side}_attention_mask"].tolist() == [[1] * len(prompt + answer)]
        assert pair[f"{side}_labels"].tolist() == [[-100] * len(prompt) + answer]


@pytest.mark.parametrize("side", ["left", "right"])
def test_dpo_batches_hold_the_chosen_first_and_then_the_rejected(write, tokenizer, pairs, side):
    pairs.padding_side = side
    batch, rows = pairs.dictionaries([0, 1], form="concatenated"), pairs.dictionaries([0, 1])
    assert list(batch) == ["concatenated_input_ids", "concatenated_attention_mask", "concatenated_labels"]
    masks = batch["concatenated_attention_mask"].bool()
    expected = [
        (rows[f"{name}_input_ids"][i][rows[f"{name}_attention_mask"][i].bool()].tolist())
        for name in ("chosen", "rejected")
        for i in range(2)
    ]
    assert [ids[mask].tolist() for ids, mask in zip(batch["concatenated_input_ids"], masks, strict=True)] == expected
    assert torch.all(batch["concatenated_labels"][~masks] == -100)
    trained = batch["concatenated_labels"] != -100
    assert tokenizer.decode(batch["concatenated_labels"][1][trained[1]]) == "多喝水<|im_end|>"
    assert tokenizer.decode(batch["concatenated_labels"][3][trained[3]]) == "不知道怎么办<|im_end|>"
    edge = -1 if side == "right" else 0
    assert masks[:, edge].sum() == 1  # only the longest row reaches the padded edge


def test_ppo_queries_are_rendered_prompts_and_their_ids(write, tokenizer):
    question = {"system": PAIR["system"], "history": [], "question": PAIR["question"]}
    data = load(PromptDataModule, write("queries.jsonl", question), tokenizer, max_length=4096)
    query = data.dictionaries([0])
    assert list(query) == ["query", "input_ids"]
    assert query == {"query": [PROMPT], "input_ids": [encode(tokenizer, PROMPT)]}
