"""A run that is resumed from a checkpoint equals the run that was never stopped, bit for bit."""

import shutil
from contextlib import nullcontext
from itertools import chain, count

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

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
            "ppo": PPOSettings(
                ppo_epochs=2, num_minibatches=2, target_kl=0.5, kl_coef=0.1, kl_horizon=50.0, scale_rewards=True
            ),
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


def saving(folder):
    return [RandomState(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(
    kind, lora, tiny_model, request, make_data, make_trainer, tmp_path
):
    items = request.getfixturevalue(CASES[kind])
    source = ModelSource(path=str(tiny_model), lora=lora)
    # 6 optimizer steps for 20 examples in 2 epochs, 8 for 2 rollouts of 4 steps: in the middle and at the end of both.
    options = {"max_epochs": 2, "accumulate_grad_batches": 2}
    saver = make_trainer(**options, enable_checkpointing=True, callbacks=saving(tmp_path))
    whole, want = run(kind, source, make_data(items), saver)
    for step in (1, 3, 4, 5):
        again = make_trainer(**options, callbacks=[RandomState()])
        resumed, got = run(kind, source, make_data(items), again, checkpoint=str(tmp_path / f"step={step}.ckpt"))
        assert 0 < len(got) < len(want)
        assert got == want[-len(got) :]
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("until", [{"max_epochs": 4}, {"max_steps": 15}], ids=["epochs", "steps"])
def test_a_run_resumed_at_the_end_of_an_epoch_can_be_resumed_again(
    until, tiny_model, prompts, make_data, make_trainer, tmp_path
):
    """Lightning 2.6 loses count of the epochs there; `begin_next_epoch` mends it."""
    source = ModelSource(path=str(tiny_model))

    def trainer(folder):
        return make_trainer(**until, enable_checkpointing=True, callbacks=saving(tmp_path / folder))

    def progress(folder, step):
        loop = torch.load(tmp_path / folder / f"step={step}.ckpt", weights_only=True)["loops"]["fit_loop"]
        return {name: value for name, value in loop.items() if "progress" in name or name == "epoch_loop.state_dict"}

    _, want = run(LitPPO, source, make_data(prompts), trainer("a"))
    run(LitPPO, source, make_data(prompts), trainer("b"), checkpoint=str(tmp_path / "a" / "step=4.ckpt"))
    assert all(progress("b", step) == progress("a", step) for step in range(5, 16))
    last = trainer("c")
    _, got = run(LitPPO, source, make_data(prompts), last, checkpoint=str(tmp_path / "b" / "step=8.ckpt"))
    assert got and got == want[-len(got) :]
    assert last.global_step == until.get("max_steps", 16)


class SaveInsideAStep(Callback):
    """Writes a checkpoint after the first of a step's micro-batches: its gradient is in no checkpoint."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("batch", [0, 3, 7, 10])
def test_a_step_that_was_only_begun_is_made_anew(kind, batch, tiny_model, request, make_data, make_trainer, tmp_path):
    items, source = request.getfixturevalue(CASES[kind]), ModelSource(path=str(tiny_model))
    options = {"max_epochs": 2, "accumulate_grad_batches": 3}
    saver = make_trainer(**options, callbacks=[RandomState(), SaveInsideAStep(tmp_path / "one.ckpt", batch)])
    whole, want = run(kind, source, make_data(items), saver)
    again = make_trainer(**options, callbacks=[RandomState()])
    resumed, got = run(kind, source, make_data(items), again, checkpoint=str(tmp_path / "one.ckpt"))
    assert got == want[-len(got) :] and again.global_step == saver.global_step
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def seen_by(stage):
    """Lets the stage note the examples of each micro-batch: what the returned list will hold."""
    seen, training_step = [], stage.training_step

    def noting(batch, batch_idx):
        seen.append(batch.indices.tolist())
        return training_step(batch, batch_idx)

    stage.training_step = noting
    return seen


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_a_run_goes_on_with_other_micro_batches_over_the_same_examples(
    kind, tiny_model, request, make_data, make_trainer, tmp_path
):
    items = request.getfixturevalue(CASES[kind])

    def go(accumulate, checkpoint=None, **options):
        stage = stage_of(kind, ModelSource(path=str(tiny_model)))
        stage.log = lambda *_, **__: None
        seen = seen_by(stage)
        trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate, **options)
        trainer.fit(stage, datamodule=make_data(items), ckpt_path=checkpoint)
        return stage, [sorted(chain(*seen[i : i + accumulate])) for i in range(0, len(seen), accumulate)], trainer

    whole, want, trainer = go(2, enable_checkpointing=True, callbacks=saving(tmp_path))
    for step, accumulate in ((1, 1), (3, 3), (4, 1), (5, 4)):
        resumed, got, again = go(accumulate, str(tmp_path / f"step={step}.ckpt"))
        assert got == want[step:]
        assert again.global_step == trainer.global_step and again.current_epoch == trainer.current_epoch
        for name, value in resumed.state_dict().items():
            torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LitSFT, LitPPO], ids=lambda kind: kind.__name__)
def test_an_epoch_that_was_cut_short_is_not_taken_up_again(
    kind, tiny_model, request, make_data, make_trainer, tmp_path
):
    items = request.getfixturevalue(CASES[kind])
    source = ModelSource(path=str(tiny_model))
    options = {"max_epochs": 3, "limit_train_batches": 2}
    saver = make_trainer(**options, enable_checkpointing=True, callbacks=saving(tmp_path))
    _, want = run(kind, source, make_data(items), saver)
    for step in (1, 2, 3, 4):
        again = make_trainer(**options, callbacks=[RandomState()])
        _, got = run(kind, source, make_data(items), again, checkpoint=str(tmp_path / f"step={step}.ckpt"))
        assert got and got == want[-len(got) :]
        assert again.global_step == 6


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


def test_a_rollout_that_was_half_used_is_not_split_anew(tiny_model, prompts, make_data, make_trainer, tmp_path):
    source = ModelSource(path=str(tiny_model))
    saver = make_trainer(max_epochs=1, enable_checkpointing=True, callbacks=saving(tmp_path))
    run(LitPPO, source, make_data(prompts), saver)
    other = stage_of(LitPPO, source)
    other.ppo = PPOSettings(ppo_epochs=1, num_minibatches=4)
    with pytest.raises(ValueError, match=r"ppo_epochs, num_minibatches = \[2, 2\], now they are \[1, 4\]"):
        make_trainer(max_epochs=2).fit(other, datamodule=make_data(prompts), ckpt_path=tmp_path / "step=1.ckpt")


def other_width(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 3
    LlamaForCausalLM(config).save_pretrained(folder)
    return {}


def other_template(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folder)
    return {}


CHANGES = {
    "policy.config.num_hidden_layers: it was 2, now it is 3": other_width,
    "policy.lora: it was None, now it is": lambda folder: {"lora": LoraSettings(r=4)},
    "policy.dtype: it was float32, now it is float64": lambda folder: {"dtype": "float64"},
    "the tokenizer differs in .*chat_template": other_template,
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_network_or_tokenizer_is_refused_by_name(
    message, tiny_model, conversations, make_data, make_trainer, tmp_path
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(LitSFT(ModelSource(path=str(folder))), datamodule=make_data(conversations))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    changed = LitSFT(ModelSource(path=str(folder), **CHANGES[message](folder)))
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=2).fit(changed, datamodule=make_data(conversations), ckpt_path=tmp_path / "one.ckpt")


def test_a_checkpoint_of_another_stage_is_refused(tiny_model, conversations, make_data, make_trainer, tmp_path):
    source, trainer = ModelSource(path=str(tiny_model)), make_trainer(max_epochs=1)
    trainer.fit(LitSFT(source), datamodule=make_data(conversations))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="it is of stage sft, this is pt"):
        make_trainer(max_epochs=2).fit(
            LitPretrain(source), datamodule=make_data(conversations), ckpt_path=tmp_path / "one.ckpt"
        )


class Broken(Exception):
    """What ends a run."""


def rows(stage, failing):
    """Notes the examples of each micro-batch that was trained; the one of this number ends the run."""
    seen, training_step, begun = [], stage.training_step, count(1)

    def step(batch, batch_idx):
        if next(begun) == failing:
            raise Broken
        loss = training_step(batch, batch_idx)
        seen.append(batch.input_ids.tolist())
        return loss

    stage.training_step = step
    return seen


@pytest.mark.parametrize("kind", [LitSFT, LitPPO], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_an_exception_ended_is_made_after_the_resume(
    kind, accumulate, tiny_model, request, make_data, make_trainer, tmp_path
):
    """At each micro-batch of two epochs: the first and the last of one too."""
    items, source = request.getfixturevalue(CASES[kind]), ModelSource(path=str(tiny_model))
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}

    def go(failing=None, checkpoint=None, **more):
        stage = stage_of(kind, source)
        stage.log, seen = lambda *_, **__: None, rows(stage, failing)
        torch.manual_seed(1)
        trainer = make_trainer(**options, **more)
        with pytest.raises(Broken) if failing else nullcontext():
            trainer.fit(stage, datamodule=make_data(items), ckpt_path=checkpoint)
        return stage, seen, trainer

    whole, want, trainer = go()
    for failing in range(1, len(want) + 1):
        saver = OnExceptionCheckpoint(tmp_path / str(failing))  # in one folder, Lightning would go on from the last one
        _, before, _ = go(failing, enable_checkpointing=True, callbacks=[saver])
        resumed, after, again = go(checkpoint=saver.ckpt_path)
        made = (failing - 1) // accumulate * accumulate
        assert before == want[: failing - 1] and after == want[made:]
        assert again.global_step == trainer.global_step
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rollout_that_an_exception_ended_is_made_after_the_resume(
    failing, tiny_model, prompts, make_data, make_trainer, tmp_path
):
    asked, rollouts = [], count(1)

    def judge(texts, answers, records):
        if next(rollouts) == failing:
            raise Broken
        asked.append(sorted(texts))
        return length_reward(texts, answers, records)

    def go(checkpoint=None, **more):
        stage = stage_of(LitPPO, ModelSource(path=str(tiny_model)))
        stage.reward_functions = (RewardFunction(judge),)
        torch.manual_seed(1)
        make_trainer(max_epochs=3, **more).fit(stage, datamodule=make_data(prompts), ckpt_path=checkpoint)
        return stage

    with pytest.raises(Broken):
        go(enable_checkpointing=True, callbacks=[OnExceptionCheckpoint(tmp_path)])
    resumed = go(checkpoint=str(tmp_path / "on_exception.ckpt"))
    got, asked[:] = list(asked), []
    whole = go()
    assert got == asked
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
