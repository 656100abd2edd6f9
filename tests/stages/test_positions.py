"""Sequences that are too long for a network are told before the first step."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from lit_align.models.source import ModelSource
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT
from lit_align.stages.positions import check_positions, has_position_table

LIMIT = 64
COMMON = {"vocab_size": 300, "max_position_embeddings": LIMIT}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 1}
TABLES = {
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": SMALL | {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "opt": SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "gptj": GPT2 | {"rotary_dim": 4},
}
NO_TABLES = {
    "llama": SMALL | {"intermediate_size": 16, "vocab_size": LIMIT},  # as many words as positions
    "gpt_neox": SMALL | {"intermediate_size": 16},
}


def network(kind, options):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | options))


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_positions_is_an_error(kind):
    model = network(kind, TABLES[kind])
    assert has_position_table(model, LIMIT)
    check_positions([("policy", model)], LIMIT)
    with pytest.raises(ValueError, match=r"policy: a sequence may have 65 tokens, .* table of positions has 64; "):
        check_positions([("policy", model)], LIMIT + 1)


@pytest.mark.parametrize("kind", NO_TABLES)
def test_positions_that_are_only_unknown_are_a_warning(kind, recwarn):
    networks = [(name, network(kind, NO_TABLES[kind])) for name in ("policy", "reference")]
    check_positions(networks, 50, 14)
    assert not recwarn
    check_positions(networks, 50, 15)
    assert [str(w.message).split(";")[0] for w in recwarn] == [
        "policy, reference: a prompt may have 50 tokens and sampling.max_new_tokens is 15, together 65, and "
        "max_position_embeddings is 64: beyond it positions are new to the model"
    ]


def test_a_network_without_a_limit_takes_any_length(recwarn):
    state = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    check_positions([("policy", state)], 10**6)
    assert not recwarn


QUESTION, ANSWER = "Who?" * 4, "Me." * 15
RECORDS = {
    SFTDataModule: {"prompt": QUESTION, "completion": ANSWER},
    PreferenceDataModule: {"prompt": QUESTION, "chosen": "You.", "rejected": ANSWER},
    PromptDataModule: {"question": QUESTION},
    PretrainDataModule: {"text": 30 * QUESTION},
}
PPO = {"reward_functions": [RewardFunction(lambda p, a, r: [0.0] * len(a))], "sampling": Sampling(80)}


@pytest.fixture
def gpt2(tiny_model, tmp_path):
    """Of the tiny model, with its tokenizer."""
    folder = shutil.copytree(tiny_model, tmp_path / "gpt2")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2, **COMMON)).save_pretrained(folder)
    return folder


def start(kind, stage, folder, tmp_path, make_trainer, **options):
    (tmp_path / "train.jsonl").write_text(json.dumps(RECORDS[kind]) + "\n")
    files = {"train": str(tmp_path / "train.jsonl"), "tokenizer": str(folder), "cache_dir": str(tmp_path / "cache")}
    data = kind(**files, batch_size=1, **options)
    make_trainer(max_steps=1).fit(stage, datamodule=data)
    return data


@pytest.mark.parametrize(
    ("stage", "kind", "options", "length"),
    [
        (LitSFT, SFTDataModule, {}, 82),
        (LitSFT, SFTDataModule, {"streaming": True, "max_length": 90}, 90),
        (LitReward, PreferenceDataModule, {}, 81),
        (LitDPO, PreferenceDataModule, {}, 81),
        (LitPretrain, PretrainDataModule, {"block_size": 100}, 100),
        (LitPretrain, PretrainDataModule, {"block_size": 70, "streaming": True}, 70),
    ],
)
def test_data_that_is_too_long_is_refused_before_the_first_step(
    stage, kind, options, length, gpt2, tmp_path, make_trainer
):
    with pytest.raises(ValueError, match=rf"a sequence may have {length} tokens, but its table .* 64; lower data"):
        start(kind, stage(ModelSource(path=str(gpt2))), gpt2, tmp_path, make_trainer, **options)


def test_answers_that_would_be_too_long_are_refused_before_the_first_step(gpt2, tmp_path, make_trainer):
    with pytest.raises(ValueError, match=r"a prompt may have \d+ tokens and sampling.max_new_tokens is 80"):
        start(PromptDataModule, LitPPO(ModelSource(path=str(gpt2)), **PPO), gpt2, tmp_path, make_trainer)
