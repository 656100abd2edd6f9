"""Stages on a quantised base: exact at the start, resumed bit for bit, checkpoints of adapters alone, export."""

import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.callbacks.random_state import RandomState
from lit_align.losses import Sigmoid
from lit_align.models.adapters import ADAPTER_CONFIG
from lit_align.models.export import export
from lit_align.models.quantization import quantization_of, quantized_layers
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.models.trunk import SharedTrunk
from lit_align.rollout.estimators import RLOO
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitReward, LitSFT, PPOSettings

CASES = [
    (LitSFT, "conversations", "nf4"),
    (LitSFT, "conversations", "int8"),
    (LitReward, "pairs", "int8"),
    (LitDPO, "pairs", "nf4"),
    (LitPPO, "prompts", "nf4"),
]
EACH_CASE = pytest.mark.parametrize("kind, items, quantization", CASES, ids=lambda v: getattr(v, "__name__", v))


def short(prompts, answers, records):
    """Reward: short answers."""
    return [-len(answer) / 10 for answer in answers]


def packed(folder, quantization, **more):
    return ModelSource(path=str(folder), quantization=quantization, lora=LoraSettings(r=4), **more)


def stage_of(kind, source, lr=0.05):
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=lr)}
    if kind is LitPPO:
        options |= {
            "reward_functions": [RewardFunction(short)],
            "ppo": PPOSettings(ppo_epochs=2, num_minibatches=2, kl_coef=0.1),
            "sampling": Sampling(max_new_tokens=5),
        }
    torch.manual_seed(0)
    return kind(source, **options)


def run(stage, data, trainer, checkpoint=None):
    logged = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    torch.manual_seed(1)
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint)
    return logged


def saving(folder):
    return [RandomState(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]


@EACH_CASE
def test_a_resumed_run_is_the_uninterrupted_run(
    kind, items, quantization, tiny_model, request, make_data, make_trainer, tmp_path
):
    data, source = request.getfixturevalue(items), packed(tiny_model, quantization)
    options = {"max_epochs": 2, "accumulate_grad_batches": 2}
    whole = stage_of(kind, source)
    saver = make_trainer(**options, enable_checkpointing=True, callbacks=saving(tmp_path))
    want = run(whole, make_data(data), saver)
    for step in (1, 3):
        resumed, path = stage_of(kind, source), str(tmp_path / f"step={step}.ckpt")
        got = run(resumed, make_data(data), make_trainer(**options, callbacks=[RandomState()]), path)
        assert 0 < len(got) < len(want) and got == want[-len(got) :]
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    state = torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"]
    assert state and all(".lora_" in name or ".modules_to_save." in name for name in state)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_dpo_begins_at_ln_2_and_learns(quantization, tiny_model, pairs, make_data, make_trainer):
    stage = LitDPO(
        packed(tiny_model, quantization), loss=Sigmoid(beta=0.5), optimizer=lambda p: torch.optim.Adam(p, 0.01)
    )
    logged = run(stage, make_data(pairs, batch_size=20), make_trainer(max_epochs=15))
    losses = [value for name, value in logged if name == "train/loss"]
    margins = [value for name, value in logged if name == "train/rewards/margins"]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-7) and margins[0] == 0.0
    assert stage.reference is None and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_first_kl_of_ppo_is_0(quantization, tiny_model, prompts, make_data, make_trainer):
    stage = LitPPO(
        packed(tiny_model, quantization),
        reward_functions=[RewardFunction(short)],
        estimator=RLOO(),
        ppo=PPOSettings(ppo_epochs=2, num_minibatches=2, num_answers=2),
        sampling=Sampling(max_new_tokens=6, temperature=0.7),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    logged = run(stage, make_data(prompts), make_trainer(max_epochs=2))
    kls = [value for name, value in logged if name == "train/objective/kl"]
    assert kls[:4] == [0.0] * 4 and kls[4] != 0.0


def test_ppo_may_hold_a_frozen_reward_model_in_few_bits(tiny_model, prompts, make_data, make_trainer):
    source = ModelSource(path=str(tiny_model), quantization="int8")
    stage = LitPPO(
        packed(tiny_model, "nf4"),
        reward_model=source,
        critic=packed(tiny_model, "nf4"),
        ppo=PPOSettings(ppo_epochs=1, num_minibatches=1),
        sampling=Sampling(max_new_tokens=4),
    )
    run(stage, make_data(prompts), make_trainer(max_steps=1))
    networks = (stage.policy, stage.critic, stage.reward_model)
    assert [quantization_of(network) for network in networks] == ["nf4", "nf4", "int8"]
    trains_packed = LitPPO(packed(tiny_model, "nf4"), reward_model=source)  # the critic begins as the reward model
    with pytest.raises(ValueError, match=r"critic \(not set, .*\)\.quantization: .* cannot be trained .*critic.*lora"):
        trains_packed.configure_model()


@pytest.mark.parametrize("stage", [LitSFT, LitReward])
def test_packed_weights_are_not_trained_themselves(stage, tiny_model):
    with pytest.raises(ValueError, match=r"quantization: weights in nf4 cannot be trained themselves.*lora"):
        stage(ModelSource(path=str(tiny_model), quantization="nf4"))


@pytest.fixture
def trained(tiny_model, conversations, pairs, make_data, make_trainer, tmp_path):
    """A checkpoint of a short run, and the stage as it ended."""

    def train(kind, quantization, folder=tiny_model, **more):
        stage = stage_of(kind, packed(folder, quantization, **more), lr=0.02)
        items = pairs if kind is LitReward else conversations
        trainer = make_trainer(max_steps=3)
        run(stage, make_data(items), trainer)
        path = tmp_path / "run.ckpt"
        trainer.save_checkpoint(path)
        return path, stage

    return train


INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])}


def outputs(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.mark.parametrize("kind", [LitSFT, LitReward])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_export_is_what_was_trained(kind, quantization, dtype, trained, tmp_path):
    path, stage = trained(kind, quantization, dtype=dtype)
    export(str(path), str(tmp_path / "hf"))
    auto, extra = (
        (AutoModelForCausalLM, {}) if kind is LitSFT else (AutoModelForSequenceClassification, {"num_labels": 1})
    )
    exported = auto.from_pretrained(tmp_path / "hf", dtype=getattr(torch, dtype), **extra)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert list(quantized_layers(exported)) == []
    network = stage.policy if kind is LitSFT else stage.reward_model
    tolerance = 1e-5 if dtype == "float32" else 0.1
    assert torch.allclose(outputs(exported).float(), outputs(network).float(), rtol=tolerance, atol=tolerance)
    with network.disable_adapter():
        assert not torch.allclose(outputs(exported).float(), outputs(network).float(), rtol=1e-2, atol=1e-2)


def test_the_merged_export_of_gpt_2_has_its_matrices_the_right_way_round(tmp_path, trained, tiny_model):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    path, stage = trained(LitSFT, "nf4", tmp_path / "gpt2")
    export(str(path), str(tmp_path / "hf"))
    assert torch.allclose(
        outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), outputs(stage.policy), atol=1e-5
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_alone_is_verified_on_a_base_in_as_few_bits(quantization, trained, tmp_path, caplog):
    path, _ = trained(LitSFT, quantization)
    export(str(path), str(tmp_path / "adapter"), merge_lora=False)
    assert (tmp_path / "adapter" / ADAPTER_CONFIG).is_file() and not (tmp_path / "adapter" / "config.json").exists()
    assert any(f"trained on a base in {quantization}" in message for message in caplog.messages)


def test_a_run_is_not_resumed_on_another_base(trained, tiny_model, conversations, make_data, make_trainer, tmp_path):
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / name).is_file():
            (folder / name).write_bytes((tiny_model / name).read_bytes())
    path, _ = trained(LitSFT, "nf4", folder)
    other = stage_of(LitSFT, packed(folder, "int8"))
    with pytest.raises(ValueError, match=r"policy\.quantization: it was nf4, now it is int8"):
        run(other, make_data(conversations), make_trainer(max_steps=5), str(path))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"policy\.base: its weights are not those"):
        run(stage_of(LitSFT, packed(folder, "nf4")), make_data(conversations), make_trainer(max_steps=5), str(path))
    with pytest.raises(ValueError, match=r"policy: the base has changed since training"):
        export(str(path), str(tmp_path / "hf"))


def test_autocast_computes_with_the_same_base(tiny_model, conversations, make_data, make_trainer):
    stages, losses = [], []
    for precision in ("32-true", "bf16-mixed"):
        stage = stage_of(LitSFT, packed(tiny_model, "nf4"))
        logged = run(stage, make_data(conversations), make_trainer(max_steps=1, precision=precision))
        losses.append(next(value for name, value in logged if name == "train/loss"))
        stages.append(stage)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for (_, layer), (_, other) in zip(*(quantized_layers(stage.policy) for stage in stages), strict=True):
        assert torch.equal(layer.dequantized(torch.float32), other.dequantized(torch.float32))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_ppo_on_one_trunk_is_ppo_on_two_packed_bases(quantization, tiny_model, prompts, make_data, make_trainer):
    stages = [stage_of(LitPPO, packed(tiny_model, quantization)) for _ in range(2)]
    stages[0].hold = SharedTrunk(stages[0].policy_source)
    for stage in stages:
        stage.configure_model()
    stages[0].load_state_dict(stages[1].state_dict())
    one, other = ([dict(quantized_layers(net)) for net in (stage.policy, stage.critic)] for stage in stages)
    assert places(one[0]) == places(one[1]) and not places(other[0]) & places(other[1])
    before = [p.clone() for layer in one[0].values() for p in layer.parameters()]
    logged = [run(stage, make_data(prompts), make_trainer(max_epochs=2)) for stage in stages]
    assert logged[0] == logged[1] != []
    after = [p for layer in one[1].values() for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def places(layers) -> set[int]:
    return {p.data_ptr() for layer in layers.values() for p in layer.parameters()}


def test_another_quantisation_than_the_trunks_is_refused(tiny_model):
    own = packed(tiny_model, "int8")
    with pytest.raises(ValueError, match=r"critic\.quantization: the policy's base is in nf4; leave int8 out"):
        SharedTrunk(packed(tiny_model, "nf4")).source_of(own, "critic")
