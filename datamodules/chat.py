"""What chat templates take: messages, with function calls as they know them or as plain text; and the fallback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datamodules.formats import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of tokenizers that have none of their own."""


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Gives a tokenizer without chat template ChatML, with its EOS as end of turn if it has no `<|im_end|>` token.

    Returns:
        Whether the tokenizer had a template of its own.
    """
    ends_with_eos = CHATML.replace("'<|im_end|>'", "eos_token")
    if tokenizer.chat_template:
        return tokenizer.chat_template not in (CHATML, ends_with_eos)
    has_end = any(token.content == "<|im_end|>" for token in tokenizer.added_tokens_decoder.values())
    if not has_end and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has no chat template, no <|im_end|> token and no EOS token, so no answer could end; "
            "give a tokenizer that has one of them"
        )
    tokenizer.chat_template = CHATML if has_end else ends_with_eos
    return False


def speaks_of_tools(messages: Sequence[Message], tools: Sequence[dict]) -> bool:
    """Whether a template has to know tools to render these."""
    return bool(tools) or any(message.calls or message.role == "tool" for message in messages)


def with_tools(messages: Sequence[Message], tools: Sequence[dict]) -> list[Message]:
    """Puts function schemas in the system text, for templates that know no tools."""
    if not tools:
        return list(messages)
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = f'Functions that may be called by answering {{"name": ..., "arguments": {{...}}}}:\n{schemas}'
    if messages and messages[0].role == "system":
        return [replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]


def as_chat(messages: Sequence[Message], native: bool) -> list[dict[str, Any]]:
    """Messages as chat templates take them; calls and results with matching ids, which some templates ask for."""
    chat: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    count = 0
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls and native:
            waiting = [(f"call{count + i:05d}", call["name"]) for i, call in enumerate(message.calls)]
            count += len(waiting)
            pairs = zip(waiting, message.calls, strict=True)
            entry["tool_calls"] = [{"id": name[0], "type": "function", "function": call} for name, call in pairs]
        elif message.calls:
            entry["content"] = "\n".join(part for part in (message.content, message.calls_text) if part)
        elif message.role == "tool" and native and waiting:
            entry["tool_call_id"], entry["name"] = waiting.pop(0)
        chat.append(entry)
    return chat
