"""What all tests share: the folder of real records, tiny models, and a limit on threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# How long examples take says how busy the machine is. Fixtures that all examples of a test share are meant.
NO_FAULTS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("any machine", deadline=None, suppress_health_check=NO_FAULTS)
settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LIT_ALIGN_SHARED", REPOSITORY.parent / "shared"))
SMOLLM = REPOSITORY / "models" / "smollm2-135m-instruct"


def pytest_itemcollected(item: pytest.Item) -> None:
    """The slow tests of a file share what takes them long, so one worker runs them all."""
    if item.get_closest_marker("slow") and not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


RANKS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _ranks_end_with_their_test() -> Iterator[None]:
    """Lightning leaves the process group of a run in this process standing, and its variables.

    The next test would write its checkpoints in that group, and the processes that it starts would wait for others.
    """
    before = {name: os.environ.get(name) for name in RANKS}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real records: skipped by name where it is absent, a failure where it has to be there."""
    folder = SHARED / "data"
    if not folder.is_dir():
        message = f"real records: no folder {folder} (set LIT_ALIGN_SHARED)"
        if os.environ.get("LIT_ALIGN_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def smollm() -> Path:
    """Folder of the real 135M model: skipped by name until `make smollm` has made it, a failure where required."""
    if not (SMOLLM / "config.json").is_file():
        message = f"real model: no folder {SMOLLM} (run `make smollm`)"
        if os.environ.get("LIT_ALIGN_REQUIRE_SMOLLM") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return SMOLLM


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a byte tokenizer (ChatML, eos <|im_end|>, pad distinct): 20k parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
