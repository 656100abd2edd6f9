"""A small byte-level tokenizer, and chat templates of several families as short jinja strings."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
]
CORPUS = [
    "system user assistant tool\n You are a helpful assistant.\n\n",
    "What is the capital of France? Paris is the capital of France.\n",
    "发烧了怎么办? 多喝水, 注意休息。\n\n高血压的症状是什么?",
    "[INST] [/INST] <think>\n\n</think>\n\n def f(x):\n    return x\n",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' or tools %}{{ '<|im_start|>system\nYou are a helpful assistant.' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for tool in tools or [] %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.tool_calls %}{{ '<|im_start|>assistant' + ('\n' + m.content if m.content else '') }}"
    "{% for call in m.tool_calls %}{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The last answer has an empty thinking block, which it loses as soon as another question follows (Qwen3 does so).
THINKS_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt opens a thinking block which finished answers do not have (DeepSeek-R1 does so).
OPENS_THINKING = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif")
# The text before an answer ends with a blank, which a tokenizer may leave out of its offsets.
BLANK_HEADER = CHATML.replace("m.role + '\n'", "m.role + ': '").replace("assistant\n", "assistant: ")
# An answer stands right after a token of its own (DeepSeek's do so).
MARKERS = (
    "{% for m in messages %}{{ ('<|start_header_id|>' if m.role == 'user' else '<|end_header_id|>') + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|end_header_id|>' }}{% endif %}"
)
NO_GENERATION_PROMPT = CHATML.partition("{% if")[0]
NOT_PREFIX_PRESERVING = "{{ (messages | length) ~ ' messages\n' }}" + CHATML
NO_END_OF_TURN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
FORGETS_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen25": QWEN25,
    "mistral": MISTRAL,
    "thinks_last": THINKS_LAST,
    "opens_thinking": OPENS_THINKING,
    "blank_header": BLANK_HEADER,
    "markers": MARKERS,
    "no_generation_prompt": NO_GENERATION_PROMPT,
    "not_prefix_preserving": NOT_PREFIX_PRESERVING,
    "no_end_of_turn": NO_END_OF_TURN,
    "forgets_system": FORGETS_SYSTEM,
    "none": None,
}
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def byte_level(special: list[str]) -> Tokenizer:
    """Byte-level BPE of a few hundred tokens; offsets are trimmed as GPT-2's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def sentence_piece(special: list[str]) -> Tokenizer:
    """BPE that puts a blank before every text, as tokenizers of SentencePiece's kind do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return tokenizer


@functools.cache
def trained(kind: str, special: tuple[str, ...]) -> str:
    """A trained tokenizer as JSON: training takes longer than reading."""
    return (byte_level if kind == "byte_level" else sentence_piece)(list(special)).to_str()


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Makes a tokenizer with the chat template of a family."""

    def make(template: str = "chatml", *, kind: str = "byte_level", special: list[str] | None = None, **options: Any):
        backend = Tokenizer.from_str(trained(kind, tuple(SPECIAL if special is None else special)))
        ends = {"chatml": "<|im_end|>", "mistral": "</s>", "llama3": "<|eot_id|>"}
        options = {"eos_token": ends.get(template, "<|im_end|>"), "pad_token": "<|endoftext|>"} | options
        if template in ("llama3", "mistral"):
            options["bos_token"] = "<|begin_of_text|>" if template == "llama3" else "<s>"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
        tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """The small tokenizer with ChatML."""
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file below the test's folder: records as JSON lines, or a text or bytes as they are."""

    def to(name: str, *content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(content) == 1 and isinstance(content[0], bytes):
            path.write_bytes(content[0])
        elif len(content) == 1 and isinstance(content[0], str):
            path.write_bytes(content[0].encode())
        else:
            path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in content), encoding="utf-8")
        return str(path)

    return to


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
