"""What has to hold exactly before anything is learned, and what training must never touch."""

import copy
import math

import pytest
import torch

from lit_align.losses import IPO, ORPO, SimPO
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.estimators import GRPO, RLOO, Reinforce
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings
from lit_align.stages.optim import WarmupConstant


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def constant(optimizer, total_steps):
    return WarmupConstant(optimizer, total_steps, warmup_ratio=0.0)


FAST = {"optimizer": sgd, "lr_scheduler": constant}


def even_tokens(prompts, answers, records):
    """Reward: share of even characters."""
    return [sum(ord(c) % 2 == 0 for c in a) / max(len(a), 1) for a in answers]


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fit(stage, data, trainer):
    logged = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    trainer.fit(stage, datamodule=data)
    return {name: [v for n, v in logged if n == name] for name, _ in logged}


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_dpo_begins_at_ln_2_and_margin_0_exactly(tiny_model, pairs, make_data, make_trainer, lora):
    stage = LitDPO(ModelSource(path=str(tiny_model), lora=lora), **FAST)
    logged = fit(stage, make_data(pairs), make_trainer(max_steps=2))
    # The mean over 8 pairs of float32 ln 2 is float32 ln 2 up to its last bit.
    assert logged["train/loss"][0] == pytest.approx(math.log(2), rel=1e-7)
    assert logged["train/rewards/margins"][0] == 0.0
    assert logged["train/loss"][1] != logged["train/loss"][0]
    assert (stage.reference is None) == (lora is not None)


def test_reward_model_begins_at_ln_2(tiny_model, pairs, make_data, make_trainer):
    stage = LitReward(ModelSource(path=str(tiny_model)), **FAST)
    logged = fit(stage, make_data(pairs), make_trainer(max_epochs=10))
    assert logged["train/loss"][0] == pytest.approx(math.log(2), rel=1e-7)
    assert max(logged["train/loss"][-3:]) < logged["train/loss"][0]


def test_language_stages_begin_near_the_uniform_loss(tiny_model, conversations, make_data, make_trainer):
    for kind in (LitPretrain, LitSFT):
        logged = fit(
            kind(ModelSource(path=str(tiny_model)), **FAST), make_data(conversations), make_trainer(max_steps=1)
        )
        assert logged["train/loss"][0] == pytest.approx(math.log(259), rel=0.02)


@pytest.mark.parametrize("estimator", [None, RLOO(), GRPO(), Reinforce()])
def test_first_ppo_ratio_is_1_and_kl_0(tiny_model, prompts, make_data, make_trainer, estimator):
    options = {} if estimator is None else {"estimator": estimator}
    stage = LitPPO(
        ModelSource(path=str(tiny_model)),
        reward_functions=[RewardFunction(even_tokens)],
        ppo=PPOSettings(ppo_epochs=2, num_minibatches=2, num_answers=2, kl_loss_coef=0.1, dual_clip=None),
        sampling=Sampling(max_new_tokens=6, temperature=0.7),
        **options,
        **FAST,
    )
    logged = fit(stage, make_data(prompts), make_trainer(max_epochs=2))
    assert logged["train/objective/kl"][:4] == [0.0] * 4
    assert logged["train/val/ratio"][0] == pytest.approx(1.0, abs=1e-6)
    assert logged["train/policy/approxkl_avg"][0] < 1e-12
    assert logged["train/policy/clipfrac_avg"][0] == 0.0
    assert logged["train/objective/kl"][4] != 0.0  # an estimate: it may be below 0
    assert logged["train/val/ratio"][-1] != logged["train/val/ratio"][0]
    assert (stage.critic is None) == (estimator is not None)


def test_frozen_networks_stay_what_they_are(tiny_model, pairs, prompts, make_data, make_trainer):
    dpo = LitDPO(ModelSource(path=str(tiny_model)), **FAST)
    ppo = LitPPO(
        ModelSource(path=str(tiny_model)),
        reward_model=ModelSource(path=str(tiny_model)),
        sampling=Sampling(max_new_tokens=4),
        **FAST,
    )
    for stage, items, frozen in ((dpo, pairs, ["reference"]), (ppo, prompts, ["reference", "reward_model"])):
        stage.configure_model()
        before = {name: weights(getattr(stage, name)) for name in frozen}
        policy = weights(stage.policy)
        make_trainer(max_epochs=2).fit(stage, datamodule=make_data(items))
        for name in frozen:
            network = getattr(stage, name)
            assert not network.training
            assert all(torch.equal(before[name][k], v) for k, v in weights(network).items())
            assert all(p.grad is None for p in network.parameters())
            assert not any(key.startswith(name) for key in stage.state_dict())
        assert any(not torch.equal(policy[k], v) for k, v in weights(stage.policy).items())


def test_adapters_train_and_their_base_does_not(tiny_model, pairs, make_data, make_trainer):
    stage = LitDPO(ModelSource(path=str(tiny_model), lora=LoraSettings(r=4)), **FAST)
    stage.configure_model()
    before = weights(stage.policy)
    make_trainer(max_steps=4).fit(stage, datamodule=make_data(pairs))
    changed = {name for name, value in weights(stage.policy).items() if not torch.equal(before[name], value)}
    assert changed and all("lora_" in name for name in changed)
    assert set(stage.state_dict()) == {f"policy.{name}" for name in before if "lora_" in name}


@pytest.mark.parametrize("loss", [IPO(beta=0.1), ORPO(beta=0.1), SimPO(beta=2.0)])
def test_other_members_of_the_family_train_without_more_ado(tiny_model, pairs, make_data, make_trainer, loss):
    stage = LitDPO(ModelSource(path=str(tiny_model)), loss=loss, rpo_alpha=1.0, **FAST)
    logged = fit(stage, make_data(pairs), make_trainer(max_epochs=8, gradient_clip_val=None))
    assert logged["train/loss"][-1] < logged["train/loss"][0]
    assert (stage.reference is None) == loss.reference_free


def test_a_step_is_the_same_however_its_work_is_split(tiny_model, conversations, pairs, make_data, make_trainer):
    for kind, items in ((LitSFT, conversations), (LitDPO, pairs), (LitReward, pairs)):
        finals = []
        for split in (
            {"accumulate": 1},
            {"accumulate": 4},
            {"accumulate": 1, "layout": "padded"},
            {"accumulate": 3, "layout": "padded", "side": "left"},
        ):
            torch.manual_seed(0)
            stage = kind(ModelSource(path=str(tiny_model)), **FAST)
            options = copy.deepcopy(split)
            trainer = make_trainer(max_steps=5, accumulate_grad_batches=options.pop("accumulate"))
            logged = fit(stage, make_data(items, **options), trainer)
            finals.append((logged["train/loss"], logged["train/grad_norm"], stage.state_dict()))
        for losses, norms, state in finals[1:]:
            assert losses == pytest.approx(finals[0][0], rel=1e-5)
            assert norms == pytest.approx(finals[0][1], rel=1e-5)
            for name, value in state.items():
                torch.testing.assert_close(value, finals[0][2][name], rtol=1e-5, atol=1e-6)


def test_first_ratio_is_1_in_mixed_precision_too(tiny_model, prompts, make_data, make_trainer):
    """bfloat16 has 8 bits: old log-probabilities from another precision would be off by 1e-3."""
    stage = LitPPO(
        ModelSource(path=str(tiny_model)),
        reward_functions=[RewardFunction(even_tokens)],
        ppo=PPOSettings(ppo_epochs=1, old_logps="recompute"),
        sampling=Sampling(max_new_tokens=6),
        **FAST,
    )
    logged = fit(stage, make_data(prompts, batch_size=16), make_trainer(max_epochs=1, precision="bf16-mixed"))
    assert logged["train/val/ratio"][0] == pytest.approx(1.0, abs=1e-5)


def test_validation_of_ppo_takes_a_share_without_prompts(tiny_model, make_trainer):
    from lit_align.batch import PromptBatch

    stage = LitPPO(ModelSource(path=str(tiny_model)), reward_functions=[RewardFunction(even_tokens)], **FAST)
    stage.configure_model()
    assert stage.validation_step(PromptBatch((), (), torch.zeros(0, dtype=torch.long)), 0) is None


def test_kl_that_is_no_part_of_the_reward_is_not_logged_as_one(tiny_model, prompts, make_data, make_trainer):
    stage = LitPPO(
        ModelSource(path=str(tiny_model)),
        reward_functions=[RewardFunction(even_tokens)],
        estimator=GRPO(),
        ppo=PPOSettings(num_answers=2),
        sampling=Sampling(max_new_tokens=4),
        **FAST,
    )
    logged = fit(stage, make_data(prompts), make_trainer(max_epochs=2))
    assert logged["train/objective/non_score_reward"] == [0.0] * len(logged["train/objective/non_score_reward"])
    assert logged["train/objective/rlhf_reward"] == logged["train/objective/scores"]


def test_a_trainer_that_never_logs_trains(tiny_model, conversations, make_data, make_trainer):
    stage, trainer = LitSFT(ModelSource(path=str(tiny_model)), **FAST), make_trainer(max_steps=2, log_every_n_steps=0)
    assert "train/loss" not in fit(stage, make_data(conversations), trainer) and trainer.global_step == 2
