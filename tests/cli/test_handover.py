"""The data modules' tokenizer is the model's own, of the same revision."""

import os
import shutil
import subprocess
import sys

import pytest
from jsonargparse import Namespace

from lit_align.cli.handover import hand_over_tokenizer

LOAD = "import sys; from datamodules.tokenizer import load_tokenizer; print(load_tokenizer(sys.argv[1], 'x').eos_token)"


def handed_over(**source):
    data = Namespace(class_path="x", init_args=Namespace(tokenizer=None))
    model = Namespace(class_path="y", init_args=Namespace(policy=Namespace(**source)))
    hand_over_tokenizer(Namespace(model=model, data=data))
    return data.init_args.tokenizer


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "org/model"}, "org/model"),
        ({"path": "org/model", "revision": "v2"}, "org/model@v2"),
        ({"path": "org/model", "revision": "v2", "tokenizer": "org/other"}, "org/other"),
        ({"path": "org/model", "gguf_file": "q4.gguf"}, "org/model/q4.gguf"),
    ],
)
def test_where_the_model_comes_from(source, expected):
    assert handed_over(**source) == expected


def test_a_folder_has_no_revisions(tmp_path):
    assert handed_over(path=str(tmp_path), revision="v2") == str(tmp_path)


def test_the_revision_is_the_one_that_is_loaded(tiny_model, tmp_path):
    hub = tmp_path / "hub" / "models--org--model"
    for revision, eos in (("main", "<|im_end|>"), ("v2", "<|endoftext|>")):
        snapshot = hub / "snapshots" / revision
        shutil.copytree(tiny_model, snapshot)
        settings = snapshot / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace('"eos_token": "<|im_end|>"', f'"eos_token": "{eos}"'))
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(revision)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for place, eos in (("org/model", "<|im_end|>"), (handed_over(path="org/model", revision="v2"), "<|endoftext|>")):
        command = [sys.executable, "-c", LOAD, place]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == eos, done.stderr
