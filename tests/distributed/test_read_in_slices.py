"""Each of two ranks reads its rows of the files alone: half of the network in memory, and the whole nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.models.fingerprint import fingerprint
from lit_align.models.load import load_causal_lm
from lit_align.models.source import ModelSource

SCRIPT = Path(__file__).parent / "read_in_slices.py"


@pytest.fixture(scope="module")
def large_model(tiny_model, tmp_path_factory):
    """330 MB in five files."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="80MB")
    for path in tiny_model.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert len(list(folder.glob("*.safetensors"))) == 5
    return folder


@pytest.mark.slow
def test_a_rank_holds_half_and_never_more(large_model, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, *launch, SCRIPT, large_model, tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = fingerprint(load_causal_lm(ModelSource(path=str(large_model))))
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert found["fingerprint"] == expected
        assert found["held"] == found["whole"] // 2
        # No lower bound: a system that is short of memory takes back pages of files that were looked at.
        assert found["VmRSS"] < 0.8 * found["whole"], found
