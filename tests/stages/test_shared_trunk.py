"""PPO on one trunk is PPO with four networks: the same numbers, with one copy of the base that nothing touches."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
from trunk import CRITIC_LORA, POLICY_LORA, FourNetworks, build, spread, write_reward_adapter

from lit_align.callbacks.random_state import RandomState
from lit_align.models import scalar_at_ends, token_logps
from lit_align.models.adapters import plain_name
from lit_align.models.export import export
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.estimators import RLOO
from lit_align.stages import LitPPO

ROLES = ("policy", "critic", "reward_model")


@pytest.fixture(scope="module")
def reward_adapter(tiny_model, tmp_path_factory) -> ModelSource:
    return write_reward_adapter(tiny_model, tmp_path_factory.mktemp("reward") / "adapter")


def on_trunk(base, reward_model=None, **options):
    return build(LitPPO, base, reward_model, shared_trunk=True, **options)


def base_weights(network) -> dict[str, torch.Tensor]:
    """The trunk's parameters and buffers by their plain name."""
    trunk = network.get_base_model().base_model
    named = {**dict(trunk.named_parameters()), **dict(trunk.named_buffers())}
    return {plain: value for name, value in named.items() if (plain := plain_name(name))}


def digest(network) -> str:
    found = hashlib.sha256()
    for name, value in sorted(base_weights(network).items()):
        found.update(name.encode() + value.detach().numpy().tobytes())
    return found.hexdigest()


class Gradients(Callback):
    """Keeps every gradient of every step, by name; and checks which parameters have one."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        assert all(p.grad is not None for _, p in named)
        assert {id(p) for _, p in named} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        self.steps.append({name: p.grad.clone() for name, p in named})


def run(stage, data, trainer, start=None, **fit):
    """Trains from the given adapters; what was logged, the gradients, the weights."""
    logged = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    stage.configure_model()
    if start is not None:
        stage.load_state_dict(start)
    torch.manual_seed(1)
    seen = Gradients()
    trainer.callbacks.append(seen)
    trainer.fit(stage, datamodule=data, **fit)
    return logged, seen.steps, {name: value.clone() for name, value in stage.state_dict().items()}


def starts(stage, seed=5) -> dict[str, torch.Tensor]:
    """Adapters and heads that say something, to begin both ways of holding the roles with."""
    stage.configure_model()
    if stage.critic_source is not stage.reward_model_source:
        spread(stage.critic, seed)
    return {name: value.clone() for name, value in stage.state_dict().items()}


def test_the_base_lies_in_memory_once(tiny_model, reward_adapter):
    stage = on_trunk(tiny_model, reward_adapter)
    stage.configure_model()
    roles = [base_weights(getattr(stage, role)) for role in ROLES]
    assert stage.reference is None
    for other in roles[1:]:
        assert other.keys() == roles[0].keys()
        assert all(value is roles[0][name] for name, value in other.items())
    lone = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    whole = sum(p.numel() for p in stage.parameters())
    own = sum(p.numel() for n, p in stage.named_parameters() if "lora_" in n or "score" in n)
    assert whole == lone + own
    adapters = [{id(p) for n, p in getattr(stage, role).named_parameters() if "lora_" in n} for role in ROLES]
    assert len(set().union(*adapters)) == sum(map(len, adapters)) > 0


@pytest.mark.parametrize("critic", ["fresh", "of the reward model"])
def test_it_equals_four_networks(critic, tiny_model, reward_adapter, prompts, make_data, make_trainer):
    own = ModelSource(path=str(tiny_model), lora=CRITIC_LORA) if critic == "fresh" else None
    one = on_trunk(tiny_model, reward_adapter, critic=own)
    start = starts(one)
    logged, gradients, weights = run(one, make_data(prompts), make_trainer(max_epochs=3), start)
    four = build(FourNetworks, tiny_model, reward_adapter, critic=own)
    expected, of_four, final = run(four, make_data(prompts), make_trainer(max_epochs=3), start)
    assert len(gradients) == 12 and weights.keys() == start.keys() == final.keys()
    for got, want in zip(gradients, of_four, strict=True):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=2e-5, atol=1e-6)
    for name, value in final.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=2e-6)
        assert not torch.equal(value, start[name]), f"{name} was not trained"
    assert [name for name, _ in logged] == [name for name, _ in expected]
    for (name, value), (_, want) in zip(logged, expected, strict=True):
        assert value == pytest.approx(want, rel=1e-4, abs=2e-6), name
    kl = [value for name, value in logged if name == "train/objective/kl"]
    assert kl[:4] == [0.0] * 4 and kl[4] != 0.0
    assert max(abs(value) for name, value in logged if name == "train/loss/value_avg") > 1e-3


def test_the_base_is_bit_identical_after_ten_steps(tiny_model, reward_adapter, prompts, make_data, make_trainer):
    stage = on_trunk(tiny_model, reward_adapter)
    stage.configure_model()
    before = [digest(getattr(stage, role)) for role in ROLES]
    frozen = {name: p.clone() for name, p in stage.reward_model.named_parameters()}
    trainer = make_trainer(max_epochs=-1, max_steps=10)
    trainer.fit(stage, datamodule=make_data(prompts))
    assert trainer.global_step == 10 and len(set(before)) == 1
    assert [digest(getattr(stage, role)) for role in ROLES] == before
    assert all(torch.equal(frozen[name], p) for name, p in stage.reward_model.named_parameters())
    assert not any(p.requires_grad for p in stage.reward_model.parameters()) and not stage.reward_model.training
    for role in ROLES:  # still one copy
        assert all(v is base_weights(stage.policy)[k] for k, v in base_weights(getattr(stage, role)).items())


def test_layers_that_are_computed_again_use_the_adapters_of_their_own_pass(
    tiny_model, reward_adapter, prompts, make_data, make_trainer
):
    """Both graphs are alive when backward begins: a switch of adapters between the forwards would be seen."""
    found, start = [], None
    for again in (False, True):
        policy = ModelSource(path=str(tiny_model), lora=POLICY_LORA, gradient_checkpointing=again)
        critic = ModelSource(path=str(tiny_model), lora=CRITIC_LORA, gradient_checkpointing=again)
        stage = on_trunk(tiny_model, reward_adapter, policy=policy, critic=critic)
        start = start or starts(stage)
        found.append(run(stage, make_data(prompts), make_trainer(max_epochs=2), start))
        assert stage.critic.get_base_model().is_activation_checkpointing is again
    for plain, other in zip(found[0][1], found[1][1], strict=True):
        assert plain.keys() == other.keys()
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_each_network_says_what_it_says_alone(tiny_model, reward_adapter, prompts, make_data, make_trainer):
    """After training: no adapter leaks into another's output, nor into the reference's."""
    from lit_align.batch import StepTotals, pack
    from lit_align.models.reference import reference_mode
    from lit_align.rollout.experience import as_examples
    from lit_align.rollout.sampling import Answer

    stage = on_trunk(tiny_model, reward_adapter)
    make_trainer(max_epochs=1).fit(stage, datamodule=make_data(prompts))
    answers = [(Answer(torch.arange(3, 9), True, torch.zeros(6)),) for _ in prompts[:4]]
    batch = pack(as_examples(prompts[:4], answers), range(4), StepTotals(1.0, 1.0))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain.set_attn_implementation("packed")
    with torch.no_grad():
        with reference_mode(stage.policy):
            torch.testing.assert_close(token_logps(stage.policy, batch), token_logps(plain, batch), rtol=0, atol=0)
        logps = token_logps(stage.policy, batch)
        value, reward = scalar_at_ends(stage.critic, batch), scalar_at_ends(stage.reward_model, batch)
        assert not torch.equal(logps, token_logps(plain, batch)) and not torch.equal(value, reward)
        stage.policy.merge_adapter()  # what another role would see if the base were touched is put back
        stage.policy.unmerge_adapter()


def test_adapter_dropout_is_off_and_evaluation_leaves_the_others_alone(tiny_model, reward_adapter):
    from lit_align.models.modes import evaluating

    policy = ModelSource(path=str(tiny_model), lora=LoraSettings(r=4, dropout=0.5))
    stage = on_trunk(tiny_model, reward_adapter, policy=policy)
    stage.configure_model()
    for role in ROLES:
        assert all(m.p == 0 for m in getattr(stage, role).modules() if isinstance(m, torch.nn.Dropout))
    with evaluating(stage.policy):
        assert not stage.policy.training and stage.critic.training
    assert stage.policy.training and not stage.reward_model.training


def test_each_role_has_its_group_in_the_optimizer(tiny_model, reward_adapter):
    stage = on_trunk(tiny_model, reward_adapter)
    stage.configure_model()
    policy, critic = stage.parameter_groups()
    assert "lr" not in policy and critic["lr"] == 1e-2
    names = {id(p): n for n, p in stage.named_parameters()}
    assert all(names[id(p)].startswith("policy.") and ".lora_" in names[id(p)] for p in policy["params"])
    assert all(names[id(p)].startswith("critic.") for p in critic["params"])
    assert sum("score" in names[id(p)] for p in critic["params"]) == 1


def saving(folder):
    return [RandomState(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]


def test_a_resumed_run_is_the_uninterrupted_one(tiny_model, reward_adapter, prompts, make_data, make_trainer, tmp_path):
    options = {"max_epochs": 2, "accumulate_grad_batches": 2}
    whole = on_trunk(tiny_model, reward_adapter)
    saver = make_trainer(**options, enable_checkpointing=True, callbacks=saving(tmp_path))
    want, _, weights = run(whole, make_data(prompts), saver)
    for step in (1, 4, 5):
        torch.manual_seed(99)
        again = make_trainer(**options, callbacks=[RandomState()])
        path = str(tmp_path / f"step={step}.ckpt")
        got, _, state = run(on_trunk(tiny_model, reward_adapter), make_data(prompts), again, ckpt_path=path)
        assert 0 < len(got) < len(want) and got == want[-len(got) :]
        assert all(torch.equal(value, weights[name]) for name, value in state.items())


def test_a_checkpoint_holds_adapters_and_heads_alone_and_both_roles_are_exported(
    tiny_model, reward_adapter, prompts, make_data, make_trainer, tmp_path
):
    stage = on_trunk(tiny_model, reward_adapter)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(stage, datamodule=make_data(prompts))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all(".lora_" in name or ".score.modules_to_save." in name for name in state)
    assert {name.split(".")[0] for name in state} == {"policy", "critic"}
    ids = torch.arange(20, 30)[None]
    for role, auto in (("policy", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        for merge in (True, False):
            export(str(tmp_path / "last.ckpt"), str(tmp_path / role), role, merge_lora=merge)
            read_back = auto.from_pretrained(tmp_path / role, **({} if role == "policy" else {"num_labels": 1}))
            network = getattr(stage, role).eval()
            torch.testing.assert_close(read_back(ids).logits, network(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_another_reward_adapter_is_refused_on_resume(
    tiny_model, reward_adapter, prompts, make_data, make_trainer, tmp_path
):
    stage, trainer = on_trunk(tiny_model, reward_adapter), make_trainer(max_epochs=1)
    trainer.fit(stage, datamodule=make_data(prompts))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = write_reward_adapter(tiny_model, tmp_path / "other", LoraSettings(r=3, alpha=7))
    changed = on_trunk(tiny_model, other)
    with pytest.raises(ValueError, match=r"critic.lora.alpha: it was 6, now it is 7"):
        make_trainer(max_epochs=2).fit(changed, datamodule=make_data(prompts), ckpt_path=tmp_path / "last.ckpt")


def test_reward_functions_need_no_reward_model_and_leave_one_out_no_critic(
    tiny_model, prompts, make_data, make_trainer
):
    with_critic = on_trunk(tiny_model)
    make_trainer(max_epochs=1).fit(with_critic, datamodule=make_data(prompts))
    assert with_critic.reward_model is None
    fresh = with_critic.critic.peft_config["default"]
    assert (fresh.r, fresh.lora_alpha) == (POLICY_LORA.r, POLICY_LORA.alpha)  # as the policy's, where nothing is said
    critic_free = on_trunk(tiny_model, estimator=RLOO())
    make_trainer(max_epochs=1).fit(critic_free, datamodule=make_data(prompts))
    assert critic_free.critic is None


def test_the_base_stays_one_when_the_stage_is_moved_or_turned_to_another_type(tiny_model, reward_adapter):
    stage = on_trunk(tiny_model, reward_adapter)
    stage.configure_model()
    stage.to(torch.float64)
    weights = dict(stage.policy.get_base_model().base_model.named_parameters())
    weights = {plain: p for name, p in weights.items() if (plain := plain_name(name))}
    for role in ROLES[1:]:
        named = dict(getattr(stage, role).get_base_model().base_model.named_parameters())
        own = {plain: p for name, p in named.items() if (plain := plain_name(name))}
        assert own.keys() == weights.keys() and all(p is weights[name] for name, p in own.items())
    assert weights["embed_tokens.weight"].dtype == torch.float64


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_base_in_bfloat16(precision, tiny_model, prompts, make_data, make_trainer):
    policy = ModelSource(path=str(tiny_model), lora=POLICY_LORA, dtype="bfloat16")
    stage = on_trunk(tiny_model, policy=policy)
    logged, _, _ = run(stage, make_data(prompts), make_trainer(max_epochs=1, precision=precision))
    assert base_weights(stage.critic)["embed_tokens.weight"].dtype == torch.bfloat16
    assert stage.critic.get_base_model().score.modules_to_save["default"].weight.dtype == torch.float32
    assert [v for n, v in logged if n == "train/objective/kl"] == [0.0] * 4
