"""A run that is resumed from a checkpoint equals the run that was never stopped, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks.random_state import RandomState
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings


def length_reward(prompts, answers, records):
    """Reward: short answers."""
    return [-len(answer) / 10 for answer in answers]


def stage_of(kind, source):
    options = {"lr_scheduler": lambda o, n: torch.optim.lr_scheduler.LinearLR(o, total_iters=n)}
    if kind is LitPPO:
        options |= {
            "reward_functions": [RewardFunction(length_reward)],
            "ppo": PPOSettings(ppo_epochs=2, num_minibatches=2, target_kl=0.5, kl_coef=0.1, kl_horizon=50.0),
            "sampling": Sampling(max_new_tokens=5),
        }
    torch.manual_seed(0)
    return kind(source, **options)


def run(kind, source, data, trainer, checkpoint=None):
    logged = []
    stage = stage_of(kind, source)
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    torch.manual_seed(1)
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint)
    return stage, logged


CASES = {
    LitPretrain: "conversations",
    LitSFT: "conversations",
    LitReward: "pairs",
    LitDPO: "pairs",
    LitPPO: "prompts",
}


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_resumed_run_is_the_uninterrupted_run(kind, lora, tiny_model, request, make_data, make_trainer, tmp_path):
    items = request.getfixturevalue(CASES[kind])
    source = ModelSource(path=str(tiny_model), lora=lora)
    saving = {"every_n_epochs": 1} if kind is LitPPO else {"every_n_train_steps": 2}

    def trainer():
        callbacks = [RandomState(), ModelCheckpoint(tmp_path, save_top_k=-1, **saving)]
        return make_trainer(max_epochs=4, enable_checkpointing=True, callbacks=callbacks, accumulate_grad_batches=2)

    whole, want = run(kind, source, make_data(items), trainer())
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    middle = checkpoints[len(checkpoints) // 2 - 1]
    resumed, got = run(kind, source, make_data(items), trainer(), checkpoint=str(middle))
    assert 0 < len(got) < len(want)
    assert got == want[-len(got) :]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_another_reference_is_refused(tiny_model, pairs, make_data, make_trainer, tmp_path):
    from transformers import AutoModelForCausalLM

    changed = tmp_path / "changed"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(changed)
    source, reference = ModelSource(path=str(tiny_model)), ModelSource(path=str(changed))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(LitDPO(source), datamodule=make_data(pairs))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="reference: its weights are not those"):
        make_trainer(max_epochs=2).fit(
            LitDPO(source, reference=reference), datamodule=make_data(pairs), ckpt_path=tmp_path / "one.ckpt"
        )


def test_a_checkpoint_from_inside_a_rollout_is_refused(tiny_model, prompts, make_data, make_trainer, tmp_path):
    source = ModelSource(path=str(tiny_model))
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    run(LitPPO, source, make_data(prompts), make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saving]))
    inside = next(tmp_path.glob("*step=3.ckpt"))
    with pytest.raises(ValueError, match="in the middle of a rollout"):
        run(LitPPO, source, make_data(prompts), make_trainer(max_epochs=3), checkpoint=str(inside))
