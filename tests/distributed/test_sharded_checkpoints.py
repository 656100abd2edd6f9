"""Sharded checkpoints: resumed bit for bit, by two ranks or one, from two or one; exported without ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_align import runs
from lit_align.models.checkpoint import read_checkpoint, rebuild
from lit_align.models.export import export
from lit_align.models.fingerprint import fingerprint
from lit_align.sharded_checkpoint import read_meta, read_whole
from lit_align.sharded_metadata import read_list

sys.path.insert(0, str(Path(__file__).parent))
import sharded_checkpoints as script

NAMES = list(script.HALFWAY)
SCRIPT = Path(script.__file__)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    for name in NAMES:  # what one process alone writes, for two to go on from
        script.fit(name, str(tiny_model), root / "of one" / name, "auto", 1)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", SCRIPT, tiny_model, root]
    done = subprocess.run([sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in range(2)]


def last_steps(result, since):
    return [row for row in result["logged"] if row[0] >= since]


def close(result, other, since):
    for name, value in result["weights"].items():
        torch.testing.assert_close(value, other["weights"][name], rtol=1e-5, atol=1e-6)
    got, want = last_steps(result, since), last_steps(other, since)
    assert [row[:2] for row in got] == [row[:2] for row in want]
    assert [row[2] for row in got] == pytest.approx([row[2] for row in want], rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_go_on_bit_for_bit(name, results):
    for rank in results:
        whole, resumed = rank[name], rank[f"{name}, resumed"]
        assert last_steps(whole, script.HALFWAY[name]) == last_steps(resumed, 0) != []
        assert all(torch.equal(v, resumed["weights"][k]) for k, v in whole["weights"].items())
        assert whole["fingerprints"] == resumed["fingerprints"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_go_on_from_what_one_wrote(name, results):
    close(results[0][f"{name}, from one"], results[0][name], script.HALFWAY[name])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_from_what_two_ranks_wrote(name, strategy, folder, results, tiny_model, tmp_path):
    resumed = script.fit(
        name, str(tiny_model), tmp_path, strategy, 1, resume=script.halfway(name, folder / name / "whole")
    )
    close(resumed, results[0][name], script.HALFWAY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_what_was_trained_and_nothing_else(name, folder, results):
    path = runs.last_checkpoint(folder / name / "whole")
    assert path.name == f"step{script.HALFWAY[name] + 1:06d}.ckpt" and runs.is_whole(path)
    whole, meta = read_whole(path), read_meta(path)
    weights = results[0][name]["weights"]
    assert whole["state_dict"].keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in whole["state_dict"].items())
    assert meta["lit_align"]["fingerprints"] == results[0][name]["fingerprints"]
    moments = whole["optimizer_states"][0]["state"]
    trained = [value for key, value in weights.items() if not key.endswith("lm_head.weight")]  # tied
    assert len(moments) == len(trained)
    assert all(set(kept) == {"step", "exp_avg", "exp_avg_sq"} for kept in moments.values())
    stored = {key.removeprefix("state_dict.") for key in read_list(path).state_dict_metadata}
    tied = {key for key in weights if key.endswith("lm_head.weight")}
    assert stored & set(weights) == set(weights) - tied and bool(tied) == ("lora" not in name), "tied weights once"
    if "lora" in name:
        assert all("lora_" in key or "score" in key for key in weights)
        stored = read_list(path).state_dict_metadata.values()
        adapters = sum(value.numel() for value in weights.values())
        assert sum(tensor.size.numel() for tensor in stored) == 3 * adapters + len(weights), "and moments, and steps"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_exported_without_ranks_as_the_run_itself_exports(name, folder, results, tmp_path):
    path = runs.last_checkpoint(folder / name / "whole")
    export(str(path), str(tmp_path / "out"))  # which compares outputs
    entry, state = read_checkpoint(path)
    role = "reward_model" if name.startswith("rm") else "policy"
    own = {k.removeprefix(f"{role}."): v for k, v in results[0][name]["weights"].items() if k.startswith(f"{role}.")}
    rebuilt = rebuild(entry, state, role)
    assert all(torch.equal(value, rebuilt.state_dict()[key]) for key, value in own.items())
    if role == "policy":
        exported = [AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", folder / name / "whole" / "hf")]
        assert fingerprint(exported[0]) == fingerprint(exported[1]) == fingerprint(rebuilt)
