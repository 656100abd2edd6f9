"""What cannot be measured everywhere still has to run: tiny sizes, on a CPU."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import gpu
from benchmarks.compare import Comparison, settings_of
from benchmarks.flops import Shape, trunk
from benchmarks.gpu_setup import CONFIGS
from benchmarks.growth import TINY, answers, documents, step_seconds
from benchmarks.prepare import as_dict, as_example, cut_model, made_up
from benchmarks.settings import CASES, Settings
from benchmarks.tokens import unique_tokens


def test_a_step_of_random_documents_is_timed():
    assert documents(2, 8, 64)[0].trained_weight == 7  # nothing stands before the first token
    assert answers(3, 8, 4, 64)[0].trained_weight == 12
    assert step_seconds({**TINY, "vocab_size": 64}, answers(3, 8, 4, 64), steps=1) > 0


HIGH_WATER = """
import torch
from benchmarks.meter import Meter, memory, reset_high_water
meter = Meter()
meter.loaded(torch.nn.Linear(2, 2))
block = torch.ones(2**24)  # 64 MiB
del block
seen = memory("VmHWM") - meter.baseline
reset_high_water()
print(seen, memory("VmHWM") - meter.baseline)
"""


def test_the_high_water_mark_starts_again_and_sees_what_was_freed(repository):
    """In a process of its own: where tests ran before, memory that they freed is used again, and nothing rises."""
    done = subprocess.run(
        [sys.executable, "-c", HIGH_WATER], cwd=repository, capture_output=True, text=True, check=True
    )
    seen, left = map(int, done.stdout.split())
    assert 50 * 2**20 < seen < 120 * 2**20
    assert left < 50 * 2**20


@pytest.mark.parametrize("name", ["dpo-0.4", "dpo-2", "dpo-4"])
def test_made_up_pairs_have_the_ratio_and_fit(name, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    rows = made_up(CASES[name], Settings(), tmp_path, steps=8)
    assert len(rows) == 8 * Settings.batch_size
    assert all(len(row["prompt"]) + max(map(len, row["branches"])) <= Settings.max_length for row in rows)
    prompts, branches = (sum(len(row["prompt"]) for row in rows), sum(len(b) for row in rows for b in row["branches"]))
    assert prompts / (branches / 2) == pytest.approx(CASES[name].ratio, rel=0.06)
    assert as_dict(as_example(rows[0])) == rows[0] and unique_tokens(rows[0]) == len(as_example(rows[0]))


def test_another_model_takes_the_place_of_the_one_before(tiny_model, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.zeros_(other.get_input_embeddings().weight)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    for model, zero in ((tiny_model, False), (tmp_path / "other", True)):
        cut_model(model, tmp_path / "policy", 1)
        cut = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        assert cut.config.num_hidden_layers == 1
        assert bool((cut.get_input_embeddings().weight == 0).all()) == zero


def test_cases_keep_the_shared_settings_but_for_their_own():
    assert settings_of(CASES["sft"], Settings()) == Settings()
    assert settings_of(CASES["sft-30"], Settings()).layers == 30
    assert settings_of(CASES["sft-30"], Settings(layers=1)).layers == 1
    assert settings_of(CASES["ppo"], Settings(steps=9)).steps == 3


@pytest.mark.parametrize(
    "shipped, rivals",
    [(1.0, ["precomputed"]), (3.0, ["shipped", "precomputed"])],
    ids=["slower than its best flags", "faster"],
)
def test_the_claim_is_against_the_peer_at_its_fastest(shipped, rivals):
    def one(speed):
        steps = [{"tokens": 10, "examples": 1}] * 3
        return {"steps": steps, "seconds": [10 / speed] * 3, "cpu_seconds": [1.0] * 3, "extra_seconds": 0.0}

    comparison = Comparison(CASES["dpo"], Settings(warmup=1), None, None)
    for variant, speed in {"shipped": shipped, "plain": 1.5, "precomputed": 2.0}.items():
        comparison.peers[variant].append((0, one(speed)))
    assert comparison.rivals() == rivals


def test_adapters_cost_two_passes_of_three():
    config = {**CONFIGS["Llama-3.1-8B"]}
    full = gpu.Training("sft", "Llama-3.1-8B", 0, (4096,), 1)
    lora = gpu.Training("sft", "Llama-3.1-8B", 0, (4096,), 1, lora=True)
    spared = gpu.needed_flops(config, full, 0, [4096]) - gpu.needed_flops(config, lora, 0, [4096])
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336  # attention's own products have no weights
    assert spared == 2 * 32 * layer * 4096 + 2 * 4096 * 128256 * 4095
    # 48.3 GFLOP per token for a full step of the 8B model at 4096 tokens is the field's count.
    assert gpu.needed_flops(config, full, 0, [4096]) / 4096 == pytest.approx(48.3e9, rel=0.01)
    assert trunk(Shape.of(CONFIGS["Qwen3-0.6B"]), 0, [1]) > 0


@pytest.mark.parametrize("part", ["attention", "head", "decode"])
def test_parts_run_on_a_cpu(part, tmp_path):
    file = tmp_path / "out.json"
    assert gpu.main([part, "--device", "cpu", "--tiny", "--results", str(file)]) == 0
    assert all(cost["ms"] > 0 for cost in json.loads(file.read_text())[part].values())


@pytest.mark.slow
def test_training_runs_on_a_cpu(tmp_path):
    file = tmp_path / "out.json"
    assert gpu.main(["train", "--device", "cpu", "--tiny", "--results", str(file)]) == 0
    found = json.loads(file.read_text())["train"]
    assert len(found) == len(gpu.TRAININGS) and all(one["tokens_per_second"] > 0 for one in found.values())


def test_a_gpu_is_asked_for_in_words():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
