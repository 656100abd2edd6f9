"""The real model on the real records, each stage for a few short steps: what it trains on, it gets better at."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from lit_align.losses import Sigmoid
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.estimators import RLOO
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings
from lit_align.stages.optim import WarmupConstant

pytestmark = [pytest.mark.slow, pytest.mark.smollm, pytest.mark.real_data]

STEPS = 5


def fit(stage, data, tmp_path: Path, steps: int = STEPS) -> dict[str, list[float]]:
    """Trains on the same few examples again and again; what was logged, by name."""
    torch.set_num_threads(1)
    logged: dict[str, list[float]] = {}
    stage.log = lambda name, value, **_: logged.setdefault(name, []).append(float(value))
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
    ).fit(stage, datamodule=data)
    assert len(logged["train/loss"]) == steps
    return logged


def head(file: Path, lines: int, tmp_path: Path) -> str:
    """A file of its first lines."""
    short = tmp_path / file.name
    short.write_text("".join(file.open(encoding="utf-8").readlines()[:lines]), encoding="utf-8")
    return str(short)


@pytest.fixture
def options(smollm):
    """Low-rank adapters and a rate that shows within a few steps."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0),
        "lr_scheduler": lambda optimizer, steps: WarmupConstant(optimizer, steps, warmup_ratio=0.0),
    }, ModelSource(path=str(smollm), lora=LoraSettings(r=8, alpha=16))


@pytest.fixture
def data_options(smollm, tmp_path):
    """Four examples, cut short, all of them in every step."""
    return {"tokenizer": str(smollm), "batch_size": 4, "cache_dir": str(tmp_path / "cache")}


def test_pre_training_lowers_the_loss(options, data_options, shared_data, tmp_path):
    file = head(shared_data / "pretrain" / "fever.txt", 4, tmp_path)
    data = PretrainDataModule(train=file, block_size=64, **data_options)
    loss = fit(LitPretrain(options[1], **options[0]), data, tmp_path)["train/loss"]
    assert loss[-1] < loss[0] - 0.1


def test_fine_tuning_lowers_the_loss(options, data_options, shared_data, tmp_path):
    file = head(shared_data / "sft" / "medical_sft.jsonl", 4, tmp_path)
    data = SFTDataModule(train=file, max_length=96, overlong="truncate", **data_options)
    loss = fit(LitSFT(options[1], **options[0]), data, tmp_path)["train/loss"]
    assert loss[-1] < loss[0] - 0.1


@pytest.mark.parametrize("kind", [LitReward, LitDPO])
def test_preferences_are_learned_from_ln_2_on(kind, options, data_options, shared_data, tmp_path):
    file = head(shared_data / "preference" / "dpo_zh.jsonl", 4, tmp_path)
    data = PreferenceDataModule(train=file, max_length=96, overlong="truncate", **data_options)
    extra = {"loss": Sigmoid(beta=0.5)} if kind is LitDPO else {}
    logged = fit(kind(options[1], **extra, **options[0]), data, tmp_path)
    assert logged["train/loss"][0] == pytest.approx(0.6931472, rel=1e-6)
    assert logged["train/loss"][-1] < 0.6


def ascii_share(prompts: list[str], answers: list[str], records: list[dict]) -> list[float]:
    """Reward: share of the characters that are ASCII."""
    return [sum(c.isascii() for c in answer) / max(len(answer), 1) for answer in answers]


def test_a_rollout_is_scored_and_learned_from(options, data_options, shared_data, tmp_path):
    file = head(shared_data / "prompts" / "medical_qa.jsonl", 2, tmp_path)
    data = PromptDataModule(train=file, max_length=96, overlong="truncate", **data_options | {"batch_size": 2})
    stage = LitPPO(
        options[1],
        reward_functions=[RewardFunction(ascii_share)],
        estimator=RLOO(),
        ppo=PPOSettings(ppo_epochs=2, num_answers=4, missing_eos_penalty=0.0),
        sampling=Sampling(max_new_tokens=12),
        **options[0],
    )
    logged = fit(stage, data, tmp_path, steps=4)
    assert logged["train/objective/kl"][0] == 0.0  # adapters off are the policy's own start, bit for bit
    assert logged["train/val/ratio"][0] == pytest.approx(1.0, abs=1e-4)
    assert logged["train/objective/kl"][-1] != 0.0
    assert all(0.0 <= score <= 1.0 for score in logged["train/objective/scores"])
