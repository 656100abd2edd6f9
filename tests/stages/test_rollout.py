"""Where old log-probabilities come from, and what is counted and timed of a rollout."""

import numpy as np
import pytest
import torch

from lit_align.batch import PromptBatch, plan_step
from lit_align.models.source import ModelSource
from lit_align.rollout import experience
from lit_align.rollout.engines import Decode, Engine, Generate
from lit_align.rollout.estimators import GAE, GRPO, RLOO
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Answer, Sampling
from lit_align.stages import LitPPO, PPOSettings, rollout
from lit_align.stages.optim import WarmupConstant


def even_tokens(prompts, answers, records):
    """Reward: share of even characters."""
    return [sum(ord(c) % 2 == 0 for c in a) / max(len(a), 1) for a in answers]


def run(tiny_model, data, trainer, engine=None, estimator=None, max_new_tokens=6, **settings):
    """What was logged, the stage afterwards, and how often each network went forward to score answers."""
    torch.manual_seed(0)
    stage = LitPPO(
        ModelSource(path=str(tiny_model)),
        reward_functions=[RewardFunction(even_tokens)],
        estimator=estimator or RLOO(),
        engine=engine or Decode(),
        ppo=PPOSettings(num_answers=2, kl_coef=0.3, **settings),
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=0.7),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        lr_scheduler=lambda o, n: WarmupConstant(o, n, warmup_ratio=0.0),
    )
    logged = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    trainer.fit(stage, datamodule=data)
    return {name: [v for n, v in logged if n == name] for name, _ in logged}, stage


@pytest.mark.parametrize("estimator", [RLOO(), GRPO(), GAE()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_rollout_of_one_step_needs_no_old_logps(
    tiny_model, prompts, make_data, make_trainer, estimator, accumulate, monkeypatch
):
    """The update is the one that recomputed log-probabilities give, and the policy scores nothing beforehand."""
    scored, read = [], rollout.answer_logps
    monkeypatch.setattr(rollout, "answer_logps", lambda model, *rest: scored.append(model) or read(model, *rest))
    results = {}
    for mode in ("recompute", "auto"):
        scored.clear()
        trainer = make_trainer(max_epochs=3, accumulate_grad_batches=accumulate)
        options = {"ppo_epochs": 1, "num_minibatches": 1, "kl_loss_coef": 0.1, "old_logps": mode}
        results[mode] = run(tiny_model, make_data(prompts), trainer, estimator=estimator, **options)
        assert len(scored) == {"recompute": 6, "auto": 3}[mode]  # 3 rollouts: policy and reference, or reference alone
    (logged, stage), (expected, other) = results["auto"], results["recompute"]
    assert all(model is stage.reference for model in scored)
    moved = {name: float((value - other.reference.state_dict()[name]).abs().max())
             for name, value in other.policy.state_dict().items()}  # fmt: skip
    assert max(moved.values()) > 1e-3
    for name, value in stage.policy.state_dict().items():
        torch.testing.assert_close(value, other.policy.state_dict()[name], rtol=0, atol=1e-6)
    assert logged["train/val/ratio"] == [1.0] * 3 and logged["train/policy/approxkl_avg"] == [0.0] * 3
    for name in ("train/loss", "train/objective/kl", "train/grad_norm"):
        assert logged[name] == pytest.approx(expected[name], abs=2e-5)
    assert "train/rollout/logps_diff" not in logged
    assert 0 < max(expected["train/rollout/logps_diff"]) < 1e-6
    assert max(expected["train/rollout/logps_diff_max"]) < 1e-5


def test_a_rollout_too_large_for_the_horizon_is_refused_before_anything_is_sampled(
    tiny_model, prompts, make_data, make_trainer, monkeypatch
):
    monkeypatch.setattr(rollout.RolloutStage, "collect", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=r"ppo.kl_horizon: horizon must exceed 3.2 for 16 episodes a rollout, got 3"):
        run(tiny_model, make_data(prompts), make_trainer(max_steps=1), target_kl=0.5, kl_horizon=3.0)


class Biased(Engine):
    """Says of every token that it was half a nat less probable than it was."""

    def sample(self, *args):
        answers = Decode().sample(*args)
        return [Answer(a.input_ids, a.finished, a.logps - 0.5) for a in answers]


def test_sampled_logps_are_taken_at_the_engines_word(tiny_model, prompts, make_data, make_trainer):
    options = {"ppo_epochs": 1, "num_minibatches": 2, "engine": Biased()}
    logged, _ = run(tiny_model, make_data(prompts), make_trainer(max_epochs=1), old_logps="sampled", **options)
    assert logged["train/val/ratio"][0] == pytest.approx(torch.tensor(0.5).exp().item(), abs=1e-5)
    assert "train/rollout/logps_diff" not in logged
    logged, _ = run(tiny_model, make_data(prompts), make_trainer(max_epochs=1), old_logps="auto", **options)
    assert logged["train/val/ratio"][0] == pytest.approx(1.0, abs=1e-6)
    assert logged["train/rollout/logps_diff"][0] == pytest.approx(0.5, abs=1e-5)
    assert logged["train/rollout/logps_diff_max"][0] == pytest.approx(0.5, abs=1e-5)


def test_another_engine_gives_the_same_run(tiny_model, prompts, make_data, make_trainer):
    logged, stage = run(tiny_model, make_data(prompts), make_trainer(max_epochs=2), ppo_epochs=2)
    expected, other = run(tiny_model, make_data(prompts), make_trainer(max_epochs=2), Generate(), ppo_epochs=2)
    assert logged["train/objective/scores"] == expected["train/objective/scores"]
    for name, value in stage.policy.state_dict().items():
        torch.testing.assert_close(value, other.policy.state_dict()[name], rtol=0, atol=1e-6)


def test_prompts_that_a_rollout_holds_twice_keep_their_order_over_any_ranks(
    tiny_model, prompts, make_data, make_trainer, monkeypatch
):
    """Minibatches are drawn by place, so the examples of a rollout have to stand in one order."""
    _, stage = run(tiny_model, make_data(prompts), make_trainer(max_epochs=1), ppo_epochs=1)
    step, lengths = np.array([4, 7, 4, 2, 7, 7]), np.array([len(prompt) for prompt in prompts])

    def answers(ranks):
        shares = []
        for plan in plan_step(step, lengths, np.zeros(len(prompts)), ranks):
            ids = tuple(prompts[i] for i in plan.indices)
            share = PromptBatch(ids, ({},) * len(ids), torch.tensor(plan.indices), plan.repeats)
            shares.append(stage._trajectories(share, 1))
        monkeypatch.setattr(experience.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(experience.dist, "get_world_size", lambda: ranks)
        monkeypatch.setattr(experience.dist, "all_gather_object", lambda gathered, _: gathered.extend(shares))
        return [[a.input_ids.tolist() for a in t.answers] for t in experience.from_all_ranks(shares[0])]

    assert len({str(group) for group in answers(1)}) == len(step)
    assert answers(2) == answers(1) == answers(3)


def test_what_a_rollout_costs_is_counted(tiny_model, prompts, make_data, make_trainer):
    trainer = make_trainer(max_epochs=2, limit_val_batches=1)
    logged, stage = run(tiny_model, make_data(prompts), trainer, ppo_epochs=1, max_new_tokens=1)
    assert len(logged["train/loss"]) == 2  # rollouts of 8 of the 16 prompts; validation is not among them
    tokens = sum(len(prompt) for prompt in prompts)
    assert stage.rollout_counts == {"prompts": 16, "prompt_tokens": tokens, "answers": 32, "sampled_tokens": 32}
    assert stage.phase_seconds.keys() == {"rollout", "scoring"}
    assert all(0 < seconds < 600 for seconds in stage.phase_seconds.values())
    assert "val/reward" in logged


@pytest.mark.parametrize(
    "settings, one_step, recomputes",
    [
        ({"ppo_epochs": 1}, True, False),
        ({"ppo_epochs": 2}, False, True),
        ({"ppo_epochs": 1, "num_minibatches": 2}, False, True),
        ({"ppo_epochs": 1, "old_logps": "recompute"}, False, True),
        ({"ppo_epochs": 1, "old_logps": "sampled"}, False, False),
        ({"ppo_epochs": 4, "old_logps": "sampled"}, False, False),
    ],
)
def test_what_the_setting_means(settings, one_step, recomputes):
    settings = PPOSettings(**settings)
    assert (settings.is_one_step, settings.recomputes_logps) == (one_step, recomputes)
