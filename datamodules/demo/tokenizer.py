"""Trains the demo's tokenizer: byte-level BPE, so that any text can be encoded, with a ChatML template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END, PAD)

VOCAB_SIZE = 896
"""Entries, the 256 bytes and the special tokens among them: enough for each word and Chinese character of the demo."""

# Chinese characters stay single: merged across words, one term would have many spellings.
HAN = r"[\u4e00-\u9fff]"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts_of(files: Mapping[str, bytes]) -> Iterator[str]:
    """The texts of the corpus to learn merges from: articles and turns of the training files."""
    for line in files["pretrain.train.txt"].decode().splitlines():
        yield line
    for line in files["sft.train.jsonl"].decode().splitlines():
        yield from (turn["value"] for turn in json.loads(line)["conversations"])


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges come from `texts`.

    Args:
        texts: What it will have to encode, most of all.
        vocab_size: Number of entries with the 256 bytes and the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(HAN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and, with the chat template in it, tokenizer_config.json."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
