"""`plan` says what a configuration will take, and loads nothing for it."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from trunk import CRITIC_LORA, build, write_reward_adapter

from lit_align.cli import remedies
from lit_align.cli.budget import _copies, _head_copy, _scoring, sent_bytes
from lit_align.cli.plan_text import size_text, time_text
from lit_align.cli.situation import Rollout, roles_of
from lit_align.cli.workload import _steps
from lit_align.machine import Machine
from lit_align.models.source import ModelSource
from lit_align.stages import LitPPO

MIB = 2**20


@pytest.fixture
def plan(cli, repository, monkeypatch, tmp_path):
    """Runs `plan` on a configuration of the repository; whatever reads weights fails."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))

    def refuse(*_, **__):
        raise AssertionError("weights are read")

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)

    def run(stage, *options):
        rates = ["--rate=1e11", "--bandwidth=1e10", "--memory=8GiB"]
        rates = [r for r in rates if not any(o.startswith(r.split("=")[0]) for o in options)]
        return cli("plan", "--config", f"configs/{stage}.yaml", "--trainer.accelerator=cpu", *rates, *options)

    return run


def row(out, name):
    """Bytes of the row of a name; None if there is none."""
    match = re.search(rf"^ +{re.escape(name)} +([\d.,]+) ([KMGT]iB)$", out, re.MULTILINE)
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    return None if match is None else float(match[1].replace(",", "")) * units[match[2]]


def close(size):
    return pytest.approx(size, rel=6e-3)


@pytest.fixture
def parameters(repository):
    """Numbers in the small model that the configurations start from, read from its file's header."""
    with (repository / "datamodules/demo/assets/sft/model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [value["shape"] for name, value in header.items() if name != "__metadata__"]
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_weights_gradients_and_states_are_those_of_the_file(plan, parameters):
    status, out, err = plan("sft")
    assert status == 0, err
    assert row(out, "policy, trained weights") == row(out, "gradients") == close(4 * parameters)
    assert row(out, "optimizer state") == close(8 * parameters)
    assert "policy, frozen weights" not in out and "buckets" not in out


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])
def test_every_stage_has_a_plan(plan, stage):
    status, out, err = plan(stage)
    assert status == 0, err
    assert re.search(r"\(the peak\)", out) and "counted from the data" in out
    assert re.search(r"the run +\d[\d,]* steps", out) and re.search(r"the run +at least \d", out)


def test_the_reference_is_a_network_or_nothing(plan, parameters):
    assert row(plan("dpo")[1], "reference, frozen weights") == close(4 * parameters)
    assert row(plan("dpo", "--model.reference_cache=true")[1], "reference, frozen weights") is None
    out = plan("dpo", "--model.policy.lora.r=4")[1]
    assert row(out, "reference, frozen weights") is None
    assert row(out, "policy, frozen weights") == close(4 * parameters)


def test_ppo_holds_four_networks_and_a_cache(plan):
    out = plan("ppo")[1]
    for name in ("policy, trained", "critic, trained", "reference, frozen", "reward_model, frozen"):
        assert row(out, f"{name} weights") > 0
    assert row(out, "keys and values of answers") > 0 and "a rollout" in out
    without = plan("ppo", "--model.estimator=RLOO")[1]
    assert "critic" not in without.split("memory of each device")[0]


@pytest.mark.parametrize("device, rows, block", [("cuda", 2**28 // 151936, 151936), ("cpu", 128, 2048)])
def test_scoring_works_on_the_policys_vocabulary_in_chunks(device, rows, block):
    """However wide a reward model is, and with the rows that the head takes at a time."""
    shapes = [SimpleNamespace(vocabulary=v, width=w, inner=2 * w, element=4) for v, w in ((151936, 16), (0, 32))]
    roles = [SimpleNamespace(shape=shape) for shape in shapes]
    rollout = Rollout(rows=64, waiting=False, prompt=100, answer=400, prompts=64, scoring_tokens=8192)
    made = SimpleNamespace(rollout=rollout, roles=roles, trained=roles[:1], mixed=False, device=device, sharded=False)
    assert _scoring(made)["head: a block of the vocabulary"] == 2 * rows * block * 4
    assert _scoring(made)["one layer at a time"] == 8192 * (2 * 32 + 3 * 64) * 4


@pytest.mark.parametrize(
    "device, mixed, element, size",
    [("cpu", False, 4, 0), ("cpu", False, 2, 4), ("cuda", False, 2, 0), ("cuda", True, 4, 2), ("cuda", False, 4, 0)],
)
def test_a_decode_step_copies_the_head_where_operands_have_another_type(device, mixed, element, size):
    assert _head_copy(SimpleNamespace(device=device, mixed=mixed), element) == size


def test_micro_batches_are_smaller_and_steps_are_the_same(plan):
    one, four = plan("sft")[1], plan("sft", "--trainer.accumulate_grad_batches=4")[1]
    assert row(four, "activations of the policy") < 0.4 * row(one, "activations of the policy")
    pattern = r"the run +(\d+) steps"
    assert re.search(pattern, one)[1] == re.search(pattern, four)[1]


def test_checkpointing_keeps_less(plan):
    one, other = plan("sft")[1], plan("sft", "--model.policy.gradient_checkpointing=true")[1]
    assert row(other, "activations of the policy") < 0.5 * row(one, "activations of the policy")


def test_copies_on_several_devices(plan, parameters):
    out = plan("sft", "--trainer.devices=4", "--trainer.strategy=ddp")[1]
    assert "on 4 x CPU (ddp: a copy each)" in out
    assert row(out, "policy, trained weights") == row(out, "buckets of the all-reduce") == close(4 * parameters)
    assert row(out, "sent for a step: all-reduce of gradients") == close(2 * 4 * parameters * 3 / 4)


def test_shards_on_several_devices(plan, parameters):
    out = plan("sft", "--trainer.devices=2", "--trainer.num_nodes=2", "--trainer.strategy=fsdp2")[1]
    assert "on 4 x CPU (fsdp2: all networks in shards)" in out
    assert row(out, "policy, trained weights") == row(out, "gradients") == close(parameters)
    assert row(out, "optimizer state") == close(2 * parameters)
    assert row(out, "sent for a step: reduce-scatter of gradients") == close(4 * parameters * 3 / 4)
    gathered = row(out, "sent for a step: all-gather of weights")
    assert 4 * parameters * 3 / 4 < gathered < 2 * 4 * parameters * 3 / 4
    whole = plan("sft", "--trainer.devices=4", "--trainer.strategy=fsdp2", "--trainer.accumulate_grad_batches=2")[1]
    assert row(whole, "gradients") == close(4 * parameters)  # added up whole until the last micro-batch


def test_what_is_gathered_where_layers_differ():
    """8 of 20 bytes are three layers, 3 of them the largest."""
    weights = SimpleNamespace(total_bytes=20, layer_bytes=3, layers_bytes=8, trained_bytes=20)
    role = SimpleNamespace(name="policy", weights=weights, shape=SimpleNamespace(layers=3, element=4), trained=True)
    made = SimpleNamespace(
        stage="sft",
        devices=2,
        sharded=True,
        mixed=False,
        accumulate=1,
        roles=[role],
        trained=[role],
        own_reference=False,
    )
    assert _copies(made, role) == {"gathered weights of the policy": 12 + 2 * 3}
    assert sent_bytes(made)["all-gather of weights"] == (20 + 8) // 2
    weights.layer_bytes = 7
    assert _copies(made, role) == {"gathered weights of the policy": 20}  # never more than there is


GATHERED = "sent for a step: all-gather of weights"


def test_an_update_of_ppo_gathers_what_it_trains_alone(plan):
    """What reference and reward model say is known from the rollout."""
    options = ("--trainer.devices=2", "--trainer.strategy=fsdp2", "--model.estimator=RLOO")
    assert row(plan("ppo", *options)[1], GATHERED) == row(plan("sft", *options[:2])[1], GATHERED)


def test_a_reference_with_adapters_off_gathers_the_policy_once_more(plan):
    options = ("--trainer.devices=2", "--trainer.strategy=fsdp2", "--model.policy.lora.r=4")
    own, cached = plan("dpo", *options)[1], plan("dpo", *options, "--model.reference_cache=true")[1]
    whole = sum(row(own, f"policy, {kind} weights") for kind in ("trained", "frozen"))  # half of it on each device
    assert row(own, GATHERED) - row(cached, GATHERED) == pytest.approx(whole, rel=0.02)
    assert row(cached, GATHERED) == row(plan("sft", *options)[1], GATHERED)


def test_sampling_and_scoring_gather_networks_whole(plan, parameters):
    options = ["--trainer.devices=4", "--trainer.strategy=fsdp2"]
    out, mixed = plan("ppo", *options)[1], plan("ppo", *options, "--trainer.precision=bf16-mixed")[1]
    narrow = plan("ppo", *options, "--trainer.precision=bf16-mixed", "--model.policy.dtype=bfloat16")[1]
    assert row(out, "policy, gathered whole") == close(4 * parameters)
    assert row(mixed, "policy, gathered whole") == row(narrow, "policy, gathered whole") == close(2 * parameters)
    assert row(out, "largest network, gathered whole") == close(4 * parameters)
    assert row(plan("ppo")[1], "policy, gathered whole") is None


def test_weights_in_bfloat16(plan, parameters):
    out = plan("sft", "--model.policy.dtype=bfloat16")[1]
    assert row(out, "policy, trained weights") == close(2 * parameters)
    assert row(out, "optimizer state") == close(4 * parameters)
    out = plan("sft", "--trainer.precision=bf16-mixed")[1]
    assert row(out, "policy, trained weights") == close(4 * parameters)
    assert 0 < row(out, "16-bit copies of the policy's matrices") < 2 * parameters


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_as_large_as_its_storages(plan, repository, kind):
    """Loaded for real by hand, for `plan` reads no weights."""
    status, out, err = plan("sft", "--model.policy.lora.r=4", f"--model.policy.quantization={kind}")
    assert status == 0, err
    assert re.search(rf"policy +0\.\d\d million parameters \(float32, {kind}\)", out)
    config = json.loads((repository / "datamodules/demo/assets/sft/config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    matrices = 2 * [(width, width)] + 2 * [(keys, width)] + 2 * [(inner, width)] + [(width, inner)]
    numbers = [a * b for a, b in matrices]
    if kind == "nf4":
        packed = sum(n / 2 + -(-n // 64) + 4 * (-(-n // 64 // 256) + 1) for n in numbers)
    else:
        packed = sum(a * b + 4 * a for a, b in matrices)
    others = 4 * (config["vocab_size"] * width + (2 * layers + 1) * width)
    assert row(out, "policy, frozen weights") == pytest.approx(layers * packed + others, rel=0.01)


def test_a_quantised_base_is_not_planned_in_shards(plan):
    options = ["--model.policy.lora.r=4", "--model.policy.quantization=nf4", "--trainer.devices=2"]
    status, _, err = plan("sft", *options, "--trainer.strategy=fsdp2")
    assert status == 2 and "policy.quantization: packed weights cannot be shared out" in err
    status, out, err = plan("sft", *options, "--memory=1MiB")
    assert status == 1 and "quantization" not in out and "fsdp2 over" not in out
    status, out, err = plan("sft", "--model.policy.lora.r=4", "--memory=1MiB")
    assert "policy.quantization: nf4" in out


def test_an_optimizer_that_takes_no_shards_is_not_planned_in_them(plan):
    two, eight = ["--trainer.devices=2", "--trainer.strategy=fsdp2"], "--model.optimizer=bitsandbytes.optim.AdamW8bit"
    status, _, err = plan("sft", *two, eight)
    assert status == 2 and "AdamW8bit cannot work on sharded weights" in err
    assert "AdamW8bit" not in plan("sft", *two, "--memory=1MiB")[1]
    assert "fsdp2 over" not in plan("sft", eight, "--memory=1MiB")[1]


def test_the_last_remedy_is_on_top_of_all_but_shards(plan):
    rest = ["--model.policy.gradient_checkpointing=true", "--trainer.accumulate_grad_batches=16"]
    rest.append("--model.policy.lora.r=16")
    said = re.search(r"AdamW8bit.*?([\d.]+ [KM]iB)(?: fits)?$", plan("sft", "--memory=2MiB")[1], re.MULTILINE)[1]
    changed = plan("sft", *rest, "--model.optimizer=bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr=0.1")[1]
    assert re.search(r"peak ([\d.]+ [KM]iB)", changed)[1] == said


def test_an_optimizer_without_state(plan):
    assert (
        row(plan("sft", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")[1], "optimizer state") is None
    )


def test_what_does_not_fit_gets_a_list_of_what_would(plan):
    status, out, _ = plan("dpo", "--memory=30MiB")
    assert status == 1 and "WARNING: it will not fit" in out
    listed = re.findall(r"^  (\S.*?) {2,}[\d.,]+ [KMG]iB(?: fits)? ", out.split("WARNING")[1], re.MULTILINE)
    assert [name.split(":")[0] for name in listed] == [
        "policy.gradient_checkpointing",
        "accumulate_grad_batches",
        "policy.lora",
        "reference_cache",
        "strategy",
        "optimizer",
    ]
    assert " fits" in out
    assert plan("dpo", "--memory=100MiB")[0] == 0


def test_the_figure_of_a_remedy_is_that_of_the_changed_configuration(plan):
    out = plan("dpo", "--memory=30MiB")[1]
    said = re.search(r"gradient_checkpointing: true +([\d.]+ MiB)", out)[1]
    changed = plan("dpo", "--model.policy.gradient_checkpointing=true")[1]
    assert re.search(r"peak ([\d.]+ MiB)", changed)[1] == said
    cached = re.search(r"reference_cache: true +([\d.]+ MiB)", out)[1]
    assert re.search(r"peak ([\d.]+ MiB)", plan("dpo", "--model.reference_cache=true")[1])[1] == cached


def test_steps_follow_epochs_limits_and_the_data(plan):
    def steps(*options):
        return int(re.search(r"the run +([\d,]+) steps", plan("dpo", *options)[1])[1].replace(",", ""))

    assert steps() == 94  # max_steps of the file
    epoch = int(re.search(r"an epoch has (\d+) steps", plan("dpo")[1])[1])
    assert epoch == 94  # 1500 pairs, 16 a step
    assert steps("--trainer.max_steps=-1", "--trainer.max_epochs=2") == 2 * epoch
    assert steps("--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.limit_train_batches=10") == 20


@pytest.mark.parametrize(
    "per_epoch, steps, epochs, limit, expected",
    [
        (10, 7, -1, None, 7),  # -1 = without end
        (10, -1, -1, None, None),
        (10, 7, None, None, 7),
        (10, -1, None, None, 1000 * 10),  # as many epochs as Lightning makes
        (10, 25, 2, None, 20),
        (10, 15, 2, None, 15),
        (10, -1, 2, 0.5, 10),
        (10, -1, 2, 12, 2 * 4),  # micro-batches, three of them a step
        (None, 7, -1, 6, 7),
        (None, -1, -1, 6, None),
        (None, -1, 2, 6, 2 * 2),
        (None, -1, 2, None, None),
    ],
)
def test_steps_are_those_that_lightning_makes(per_epoch, steps, epochs, limit, expected):
    trainer = {"max_steps": steps, "max_epochs": epochs, "limit_train_batches": limit, "accumulate_grad_batches": 3}
    assert _steps(per_epoch, trainer) == expected


def test_data_that_is_too_large_is_not_counted(plan, monkeypatch):
    monkeypatch.setattr("datamodules.costing.CHEAP", 10)
    status, out, _ = plan("dpo")
    assert status == 0 and "not counted: every example as long as it may be (512 tokens a sequence)" in out
    assert "largest micro-batch of a device: 16,384 positions" in out  # 16 pairs of 2 x 512
    monkeypatch.undo()


def test_tokenised_data_is_counted_however_large(plan, monkeypatch):
    assert "counted from the data" in plan("dpo")[1]
    monkeypatch.setattr("datamodules.costing.CHEAP", 10)
    assert "(counted from the data)" in plan("dpo")[1]


def test_time_is_flops_by_the_rate(plan):
    out = plan("sft", "--rate=5e6", "--bandwidth=1e30", "--share=0.25")[1]
    flops = float(re.search(r"([\d.e+]+) model FLOPs on all devices", out)[1])
    floor, share = re.search(r"a step +at least ([\d.]+) min; ([\d.]+) min at a share of 0.25", out).groups()
    assert float(floor) * 60 == pytest.approx(flops / 5e6, rel=0.01) and float(share) == pytest.approx(
        4 * float(floor), rel=0.01
    )


def test_ranks_of_a_host_share_its_memory_and_cores(cli, repository, monkeypatch, tmp_path):
    """Those of other hosts do not."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_align.cli.plan.usable_memory", lambda: 8 * 2**30)
    monkeypatch.setattr("lit_align.cli.plan.this_machine", lambda *_: Machine(8e9, 4e9))
    monkeypatch.setattr("lit_align.cli.plan.share_of_cores", lambda ranks: 1 / ranks)
    options = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.num_nodes=4", "--trainer.strategy=ddp")
    status, out, err = cli("plan", "--config", "configs/sft.yaml", *options)
    assert status == 0, err
    assert "of the device's 4.00 GiB" in out
    assert "(a device at best: 4 GFLOP/s, 2.0 GB/s;" in out
    out = cli("plan", "--config", "configs/sft.yaml", *options, "--rate=5e9")[1]
    assert "(a device at best: 5 GFLOP/s, 2.0 GB/s;" in out  # what is given is of one device


def test_another_machine_is_not_guessed(plan, cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = cli("plan", "--config", "configs/sft.yaml", "--trainer.accelerator=gpu", "--trainer.devices=2")
    assert status == 0, err
    assert "give --rate and --bandwidth" in out and "give --memory" in out


@pytest.mark.parametrize(
    "option, said",
    [
        ("--trainer.precision=bf16-true", "set the network's own dtype (policy.dtype: bfloat16)"),
        ("--trainer.strategy=deepspeed", "knows auto, ddp and fsdp2"),
        ("--memory=much", "expected a size such as 80GiB"),
        ("--memory=1.2.3GiB", "expected a size such as 80GiB or 24GB, above 0, got '1.2.3GiB'"),
        ("--memory=0", "expected a size such as 80GiB or 24GB, above 0, got '0'"),
        ("--rate=0", "expected a number above 0"),
        ("--rate=nan", "expected a number above 0"),
        ("--share=2", "expected a share above 0 and at most 1, got '2'"),
        ("--share=0", "expected a share above 0 and at most 1, got '0'"),
        ("--trainer.devices=0", "trainer.devices: expected at least 1, -1 or auto, got 0"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: expected at least 1, got 0"),
        ("--data.train=null", "no training data; give data.train"),
        ("--model.policy.path=nowhere/at-all", "cannot read a configuration"),
        ("--model.polic=x", "polic"),
    ],
)
def test_a_wrong_configuration_is_one(plan, option, said):
    status, _, err = plan("sft", option)
    assert status == 2 and said in err


def test_devices_that_cannot_be_counted_here_are_said_to_be_one(cli, repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ("--config", "configs/sft.yaml", "--config", "configs/trainer/fsdp.yaml")
    said = "trainer.devices: auto was counted as 1 a host, for there is no GPU here"
    status, out, err = cli("plan", *options)
    assert status == 0, err
    assert said in out
    assert said not in cli("plan", *options, "--trainer.devices=2")[1]


def test_nothing_is_written_but_the_cache(plan, repository):
    before = sorted(repository.glob("runs/*/*"))
    plan("sft")
    assert sorted(repository.glob("runs/*/*")) == before


def test_help_and_the_list_of_commands(cli):
    assert cli("plan", "--help")[1].startswith("usage: lit-align plan")
    assert re.search(r"^  plan ", cli("--help")[1], re.MULTILINE)


def test_words():
    assert size_text(1536) == "1.50 KiB" and size_text(80 * 2**30) == "80.0 GiB" and size_text(345.4 * MIB) == "345 MiB"
    assert time_text(0.0123) == "12.3 ms" and time_text(90) == "90 s" and time_text(7200) == "2 h"


# ---- PPO on one trunk: one base, three adapters, two heads

LORA = "--model.policy.lora.r=4"


def held(stage) -> dict[str, int]:
    return {role.name: role.weights.trained_bytes + role.frozen_bytes for role in roles_of(stage)}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("critic", [None, CRITIC_LORA], ids=["critic from the reward model", "fresh critic"])
def test_planned_weights_are_those_of_the_networks(critic, shared, tiny_model, tmp_path):
    reward = write_reward_adapter(tiny_model, tmp_path / "rm")
    own = None if critic is None else ModelSource(path=str(tiny_model), lora=critic)
    stage = build(LitPPO, tiny_model, reward, critic=own, shared_trunk=shared)
    planned = held(stage)
    stage.configure_model()
    assert sum(planned.values()) == sum(p.numel() * p.element_size() for p in stage.parameters())
    trained = sum(role.weights.trained_bytes for role in roles_of(stage))
    assert trained == sum(p.numel() * p.element_size() for p in stage.parameters() if p.requires_grad)
    assert sorted(planned) == ["critic", "policy", "reward_model"]


@pytest.fixture(scope="module")
def reward_adapter(repository, tmp_path_factory):
    """Made before `plan` refuses to read weights."""
    return write_reward_adapter(repository / "datamodules/demo/assets/sft", tmp_path_factory.mktemp("rm") / "adapter")


def test_the_base_is_counted_once(plan, parameters, reward_adapter):
    options = (LORA, f"--model.reward_model.path={reward_adapter.path}")
    status, out, err = plan("ppo", *options, "--model.shared_trunk=true")
    assert status == 0, err
    assert row(out, "policy, frozen weights") == close(4 * parameters)
    for role in ("critic, trained", "critic, frozen", "reward_model, frozen"):
        assert 0 < row(out, f"{role} weights") < 0.2 * 4 * parameters
    assert row(out, "reference, frozen weights") is None
    assert out.count("on the policy's trunk") == 2
    apart = plan("ppo", *options)[1]
    assert row(apart, "reward_model, frozen weights") > 3 * parameters
    assert row(apart, "critic, trained weights") > 3 * parameters


def test_what_cannot_lie_on_the_trunk_is_refused_by_the_plan_too(plan):
    status, _, err = plan("ppo", "--model.shared_trunk=true")
    assert status == 2 and "set policy.lora" in err
    status, _, err = plan("ppo", LORA, "--model.shared_trunk=true")
    assert status == 2 and "critic: with shared_trunk expected a folder of adapters on the policy's base" in err


def test_a_critic_that_is_trained_whole_is_not_counted_in_4_bits(plan, monkeypatch):
    changed = []
    real = remedies._in_four_bits
    monkeypatch.setattr(remedies, "_in_four_bits", lambda situation: changed.append(real(situation)) or changed[-1])
    plan("ppo", "--model.policy.lora.r=4", "--memory=1KiB")
    sources = {role.name: role.source for role in changed[0].trained}
    assert sources["policy"].quantization == "nf4"
    for name, source in sources.items():
        source.validate(name, trained=True)
