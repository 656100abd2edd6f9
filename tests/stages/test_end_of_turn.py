"""What ends a turn in the data ends answers too, and is in what is exported, whatever the base's eos is."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig

from datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_align.models.export import export
from lit_align.models.source import ModelSource
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitPPO, LitReward, LitSFT

RECORD = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}


@pytest.fixture(params=["template", "no template"])
def base(request, tiny_model, tmp_path):
    """A base model whose texts end with another token than the turns of ChatML."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|pad|>"
    if request.param == "no template":
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def data(kind, record, base, tmp_path, **options):
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    return kind(
        train=str(tmp_path / "train.jsonl"),
        tokenizer=str(base),
        batch_size=1,
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


@pytest.mark.parametrize("built", [False, True], ids=["fresh", "built before"])
def test_an_end_of_turn_that_is_trained_ends_answers_and_is_exported(built, base, make_trainer, tmp_path):
    """In code, with a plain trainer; also where the networks were built before it came."""
    stage, trainer = LitSFT(ModelSource(path=str(base))), make_trainer(max_steps=1)
    if built:
        stage.configure_model()
    trainer.fit(stage, datamodule=data(SFTDataModule, RECORD, base, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert len(ends) == 2 and set(stage.stop_ids) == ends
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    export(str(tmp_path / "one.ckpt"), str(tmp_path / "hf"))
    assert set(GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id) == ends
    text = AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(RECORD["messages"], tokenize=False)
    assert text == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"


def test_ppo_ends_answers_with_the_turn(base, make_trainer, tmp_path):
    options = {"reward_functions": [RewardFunction(lambda p, a, r: [0.0] * len(a))], "sampling": Sampling(4)}
    stage = LitPPO(ModelSource(path=str(base)), **options)
    make_trainer(max_steps=1).fit(stage, datamodule=data(PromptDataModule, {"question": "Who?"}, base, tmp_path))
    assert stage.tokenizer.convert_tokens_to_ids("<|im_end|>") in stage.stop_ids


def test_a_reward_model_keeps_the_template_of_its_data(base, make_trainer, tmp_path):
    stage = LitReward(ModelSource(path=str(base)))
    pair = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
    make_trainer(max_steps=1).fit(stage, datamodule=data(PreferenceDataModule, pair, base, tmp_path))
    assert "<|im_end|>" in stage.tokenizer.apply_chat_template(RECORD["messages"], tokenize=False)
