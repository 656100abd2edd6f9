"""PPO on one trunk learns what PPO with four networks learns: answers of even characters; chance gives half of them."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from conftest import QUIET, ExampleData, prompts
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM
from trunk import CRITIC_LORA, build

from lit_align.models.source import ModelSource
from lit_align.stages import LitPPO


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with longer embeddings: as it is, its frozen projection can say next to nothing."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("longer") / "base"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data.mul_(20)
    model.save_pretrained(folder)
    return folder


def learn(base, shared: bool) -> tuple[list[float], list[float]]:
    """Score of each rollout, and the critic's loss in its last step."""
    torch.manual_seed(3)
    critic = ModelSource(path=str(base), lora=CRITIC_LORA)
    ppo = {"num_answers": 4, "kl_coef": 0.01, "missing_eos_penalty": 0.0}
    stage = build(LitPPO, base, critic=critic, shared_trunk=shared, ppo=ppo)
    stage.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    logged = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    trainer = Trainer(**QUIET, devices=1, max_epochs=12, log_every_n_steps=4, limit_val_batches=0, gradient_clip_val=1)
    trainer.fit(stage, datamodule=ExampleData(prompts.__wrapped__(), batch_size=16))
    names = ("train/objective/scores", "train/loss/value_avg")
    return tuple([value for name, value in logged if name == wanted] for wanted in names)


def test_it_learns_and_as_four_networks_do(base):
    (scores, values), (expected, _) = (learn(base, shared) for shared in (True, False))
    assert scores[:2] == pytest.approx(expected[:2], abs=1e-3)  # later a rounding may flip a token, and what follows
    for found in (scores, expected):
        assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.3
    assert sum(values[-3:]) / 3 < 0.5 * values[0]
