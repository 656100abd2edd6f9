"""What a sharded run asks of its ranks and when, what types it computes in, and what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_align.models.fingerprint import fingerprint
from lit_align.models.load import load_causal_lm
from lit_align.models.source import ModelSource
from lit_align.rollout.engines import Decode
from lit_align.rollout.sampling import Sampling

SCRIPT = Path(__file__).parent / "sharded_parts.py"
GROUPS = 3
"""Of the tiny model: two layers, and the root."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    other = folder / "other"
    other.mkdir()
    for path in tiny_model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"vocab_size": 259', '"vocab_size": 260'))
    assert config != (other / "config.json").read_text()
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", SCRIPT]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), "OTHER_SHAPE": str(other)}
    command = [sys.executable, *launch, tiny_model, folder / "out"]
    # The time limit is the watchdog: ranks that wait for each other never end.
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder / 'out'}.{rank}", weights_only=True) for rank in range(2)]


def test_gradients_are_summed_once_a_step(ranks):
    """Two steps of three micro-batches each."""
    assert all(rank["reductions"] == [0, 0, GROUPS] * 2 for rank in ranks)


def test_answers_are_those_of_the_whole_network(ranks, tiny_model):
    policy = load_causal_lm(ModelSource(path=str(tiny_model)))
    prompts = [torch.arange(5 + i) + 10 * i for i in range(5)]
    noise = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    stops = {policy.generation_config.eos_token_id}
    expected = Decode()(policy, prompts, 1, sorted(stops), Sampling(max_new_tokens=6), noise)
    answers = [ids for rank in ranks for ids in rank["rollouts"]["answers"]]
    assert [ids.tolist() for ids in answers] == [answer.input_ids.tolist() for (answer,) in expected]


@pytest.mark.parametrize("share", ["unequal shares", "an empty share", "one ends at once"])
def test_a_rollout_gathers_each_group_once_however_long_it_is(share, ranks):
    assert all(rank["rollouts"][share] == {"gathers": GROUPS, "reductions": 0} for rank in ranks)
    assert ranks[0]["rollouts"]["lengths"] == [1] * 5 and ranks[1]["rollouts"]["lengths"] == [6] * 5
    assert [rank["rollouts"]["kl"] for rank in ranks] == [4, 1]
    assert [rank["rollouts"]["rollout"] for rank in ranks] == [4, 0]


def test_a_rollout_leaves_shards_and_the_same_weights(ranks, tiny_model):
    expected = fingerprint(load_causal_lm(ModelSource(path=str(tiny_model))))
    for found in (rank["rollouts"] for rank in ranks):
        assert found["left whole"] == []
        assert found["whole before"] == found["whole after"] == expected


def test_answers_between_the_micro_batches_of_a_step_change_nothing(ranks, tiny_model):
    without, with_answers = ranks[0]["inside"]
    assert without == with_answers != fingerprint(load_causal_lm(ModelSource(path=str(tiny_model))))


def test_nothing_adds_up_for_a_network_without_backward(ranks):
    assert [rank["passes"] for rank in ranks] == [0, 0]


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_layers_compute_in_bfloat16_over_float32_shards(stage, ranks):
    for found in (rank[f"bf16 {stage}"] for rank in ranks):
        assert found["hidden"] == "torch.bfloat16"
        assert found["weights"] == found["gradients"] == ["torch.float32"]
    if stage == "rm":
        assert found["score"] == "torch.float32" and found["losses"][0] == pytest.approx(0.6931472, abs=1e-6)
    else:
        assert found["losses"] == pytest.approx(ranks[0]["fp32 sft"]["losses"], rel=1e-3)
        assert found["losses"] != ranks[0]["fp32 sft"]["losses"]


def test_weights_may_be_bfloat16_altogether(ranks):
    for found in (rank["pure sft"] for rank in ranks):
        assert found["weights"] == found["gradients"] == ["torch.bfloat16"]
        assert found["losses"] == pytest.approx(ranks[0]["fp32 sft"]["losses"], rel=1e-3)


def test_an_embedding_may_grow_for_a_padding_token(ranks):
    assert [rank["padding"] for rank in ranks] == [(260, 0.0)] * 2


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "qwen3_moe"])
def test_other_architectures_compute_the_same_in_shards(kind, ranks):
    for rank in ranks:
        logps, norm = rank["architectures"][kind]
        assert logps < 1e-5 and norm < 1e-5


@pytest.mark.parametrize(
    "what, words",
    [
        ("whole", r"fsdp2 found \d+ weights that are not in shards \(policy.model.embed_tokens.weight, ...\)"),
        ("optimizer", "bitsandbytes' AdamW8bit cannot work on sharded weights"),
        (
            "precision",
            "fsdp2 takes 32-true or bf16-mixed; got bf16-true; for weights in bfloat16 set",
        ),
        ("shape", r"policy.path: model.embed_tokens.weight in '.*' has shape \(129, 32\); LlamaForCausalLM expects"),
    ],
)
def test_what_cannot_be_is_told_on_every_rank(what, words, ranks):
    assert all(re.search(words, rank["errors"][what]) for rank in ranks)
