"""Tokenizers: loading, the token that ends a turn, a padding token that is none of the text's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_align.models.gguf import set_special_tokens
from lit_align.models.source import ModelSource

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Where a padding token is looked for, in this order; none of them ends a turn where another token does."""
NEW_PAD_TOKEN = "<|pad|>"


def load_tokenizer(source: ModelSource, name: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a source, from `tokenizer`, or else from where the model comes from.

    Its template and its special tokens are left as they are; only where there is no padding token at all, one is
    chosen, since batches cannot be padded without.

    Raises:
        ValueError: When no tokenizer can be loaded from there.
    """
    location, gguf_file = source.tokenizer_location
    options = {"gguf_file": gguf_file} if gguf_file else {}
    if source.tokenizer is None and source.revision is not None:
        options["revision"] = source.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=source.trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}.tokenizer: cannot load a tokenizer from {location!r}: {first_line(error)}") from error
    if gguf_file and (Path(str(location)) / gguf_file).is_file():
        set_special_tokens(tokenizer, Path(str(location)) / gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = next(_free_tokens(tokenizer), tokenizer.eos_token)
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an error's text: the libraries below append pages of advice about other machines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token with which the chat template ends the assistant's turn.

    Returns:
        None when there is no template, when it refuses a plain exchange, or when it ends turns with text.
    """
    if not tokenizer.chat_template:
        return None
    exchange = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = str(tokenizer.apply_chat_template(exchange, tokenize=False))
    except TemplateError:
        return None
    ids = tokenizer(text.rpartition("answer")[2], add_special_tokens=False).input_ids
    return next((i for i in ids if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder), None)


def separate_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives the tokenizer a padding token that no text ends with, and returns its id.

    transformers' sequence classifiers read their score at the last token that is not padding. Where padding and
    end of turn are one token they read one token too early, so a reward model's folder needs two. A token of the
    vocabulary is preferred; if none is free, `<|pad|>` is added and the id may lie beyond the model's embedding.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in _text_ids(tokenizer):
        free = next(_free_tokens(tokenizer), None)
        if free is None:
            tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
        else:
            tokenizer.pad_token = free
    return tokenizer.pad_token_id


def _text_ids(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, end_of_turn_id(tokenizer)}


def _free_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    vocabulary = tokenizer.get_vocab()
    taken = _text_ids(tokenizer)
    padding = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if "pad" in token.content)
    for token in (*PAD_TOKENS, *padding):
        if token in vocabulary and vocabulary[token] not in taken:
            yield token
