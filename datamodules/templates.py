"""Messages to token ids, through the tokenizer's own chat template.

The whole conversation is rendered and tokenised once, so the ids are those of `apply_chat_template(tokenize=True)`.
Which tokens are the assistant's is found by rendering the conversation up to each answer: where that text ends, the
answer begins; it ends with the end-of-turn token, which is trained, so that the model learns to stop. What the
template puts after it (a line break, often) is not trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from datamodules.chat import as_chat, ensure_chat_template, speaks_of_tools, with_tools
from datamodules.formats import DataError, Message, Place

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = Message("user", "Quest1on"), Message("assistant", "An5wer")
PROBE_TOOL = {"type": "function", "function": {"name": "pr0be_tool", "description": "d", "parameters": {}}}
PROBE_CALL = Message("assistant", "", ({"name": "pr0be_call", "arguments": {"pr0be_key": 1}},), "{}")
PROBE_RESULT = Message("tool", "pr0be_result")


@dataclass(frozen=True)
class Turns:
    """A tokenised conversation.

    Attributes:
        ids: Token ids, int32 [T].
        turns: For each token the index of the assistant's message that it belongs to, end-of-turn token included;
            -1 = not the assistant's. int32 [T].
    """

    ids: np.ndarray
    turns: np.ndarray


class ChatTemplate:
    """Renders and tokenises conversations, prompts and answers.

    Args:
        tokenizer: A fast tokenizer (it has to know which characters a token stands for).

    Attributes:
        own: Whether the template is the tokenizer's own (else it is ChatML).
        end_of_turn: Text of the token that ends an assistant's turn, found by rendering one.
        end_of_turn_id: Its id.

    Raises:
        ValueError: The tokenizer is not a fast one, or its template ends no answer with a token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} knows no offsets; give a fast tokenizer (tokenizer.json)")
        self.own = ensure_chat_template(tokenizer)
        self.tokenizer = tokenizer
        added = sorted(tokenizer.added_tokens_decoder.items())
        self._added = {token.content: number for number, token in added if token.content.strip()}
        special = [token.content for _, token in added if token.special and token.content.strip()]
        self._control = re.compile("|".join(map(re.escape, special))) if special else None
        self._header = ""
        self.end_of_turn = self._probe_end_of_turn()
        self.end_of_turn_id = self._added[self.end_of_turn]

    def render(self, messages: Sequence[Message], tools: Sequence[dict] = (), *, generation: bool = False) -> str:
        """The text of messages; `generation` adds what the template writes before an answer."""
        native = not speaks_of_tools(messages, tools) or self.supports_tools
        chat = as_chat(messages, native) if native else as_chat(with_tools(messages, tools), native)
        text = self._apply(chat, list(tools) if native else [], generation=generation)
        return text + self._header if generation else text

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the template writes function schemas, calls and results; if not, they are put as plain text."""
        chat = as_chat([QUESTION, PROBE_CALL, PROBE_RESULT, ANSWER], native=True)
        try:
            text = self._apply(chat, [PROBE_TOOL])
        except Exception:  # a template may fail in any way on what it was not written for: then it has no support
            return False
        return all(word in text for word in ("pr0be_tool", "pr0be_call", "pr0be_key", "pr0be_result"))

    def conversation(self, messages: Sequence[Message], tools: Sequence[dict], place: Place) -> Turns:
        """Tokenises a whole conversation and marks the assistant's tokens.

        Raises:
            DataError: The template refuses the conversation, or is not prefix-preserving on it.
        """
        self._check_texts(messages, place)
        full = self._render(messages, tools, place)
        self._check_complete(messages, full, place)
        spans = self._answers(messages, tools, full, place)
        encoding = self._encode(full)
        turns = _mark(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), spans)
        ids = np.array(encoding.ids, dtype=np.int32)
        for _, _, i in spans:
            last = np.flatnonzero(turns == i)[-1:]
            assert len(last) and ids[last[0]] == self.end_of_turn_id, "the end of turn has to be a token of its own"
        return Turns(ids, turns)

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict], place: Place) -> tuple[str, np.ndarray]:
        """The rendered prompt, with what the template writes before an answer: its text and its ids, int32 [P]."""
        self._check_texts(messages, place)
        text = self._render(messages, tools, place, generation=True)
        self._check_complete(messages, text, place)
        return text, self._ids(text)

    def response(
        self, messages: Sequence[Message], answer: Message, tools: Sequence[dict], prompt: str, place: Place
    ) -> np.ndarray:
        """Ids of an answer to a rendered prompt, end-of-turn token included and nothing after it, int32 [R].

        The prompt is tokenised by itself, so the answers of a pair continue the very same ids. So is the answer,
        except by tokenizers that would put something (a blank) before a text that stands alone.
        """
        self._check_texts([answer], place)
        full = self._render([*messages, answer], tools, place)
        start = self._answer_start(messages, tools, full, place)
        text = full[start : self._answer_stop(full, start, place)]
        ids, prompt_ids = self._ids(text), self._ids(prompt)
        if not self._context_free:
            together = self._ids(prompt + text)
            if np.array_equal(together[: len(prompt_ids)], prompt_ids):
                ids = together[len(prompt_ids) :]
        assert ids[-1] == self.end_of_turn_id, "the end of turn has to be a token of its own"
        return ids

    def check_prefix_preserving(self) -> None:
        """Raises a ValueError unless text up to an answer stays as it is when the answer and more turns follow."""
        messages, place = [QUESTION, ANSWER, replace(QUESTION, content="An0ther"), ANSWER], Place("a probe")
        try:
            self._answers(messages, (), self._render(messages, (), place), place)
        except DataError as error:
            raise ValueError(f"this chat template cannot be used for conversations: {error}") from None

    def warnings(self) -> list[str]:
        """What a user should know about this template with this tokenizer."""
        texts = []
        if not self.own:
            texts.append(f"the tokenizer has no chat template: ChatML is used, turns end with {self.end_of_turn}")
        before, full = self.render([QUESTION], generation=True), self.render([QUESTION, ANSWER])
        if full.startswith(before) and (ids := self._plain_ids(before)) != self._plain_ids(full)[: len(ids)]:
            texts.append(
                "the last tokens of a prompt change when an answer follows, so training sees other tokens there than "
                "the model does when it answers; a template that ends prompts with a token of its own avoids it"
            )
        return texts

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict], place: Place, *, generation: bool = False
    ) -> str:
        try:
            return self.render(messages, tools, generation=generation)
        except Exception as error:  # a template is other people's code, and a record's tools may hold any JSON
            roles = " ".join(message.role for message in messages)
            found = f"turns that the tokenizer's chat template refuses ({error}): {roles}"
            raise place.fault("chat template", found, "turns that it can render", "") from None

    def _answers(
        self, messages: Sequence[Message], tools: Sequence[dict], full: str, place: Place
    ) -> list[tuple[int, int, int]]:
        """Start and stop of each answer in the rendered conversation, and the number of its message."""
        spans: list[tuple[int, int, int]] = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                start = self._answer_start(messages[:i], tools, full, place)
                if spans and spans[-1][1] > start:
                    raise self._endless(place)
                spans.append((start, self._answer_stop(full, start, place), i))
        return spans

    def _answer_start(self, messages: Sequence[Message], tools: Sequence[dict], full: str, place: Place) -> int:
        """Where the answer to `messages` begins in `full`."""
        before = self._render(messages, tools, place)
        header = self._render(messages, tools, place, generation=True)
        if not (full.startswith(before) and header.startswith(before)):
            at = next((i for i, (a, b) in enumerate(zip(before, full, strict=False)) if a != b), len(full))
            found = (
                f"a chat template that is not prefix-preserving: with {len(messages)} messages it writes "
                f"{before[max(at - 20, 0) : at + 20]!a} where the whole conversation has "
                f"{full[max(at - 20, 0) : at + 20]!a}"
            )
            mend = "Use a tokenizer whose template does not change what it wrote when more turns follow"
            raise place.fault("chat template", found, "the same text", mend)
        return len(before) + self._shared(header[len(before) :], full[len(before) :])

    def _shared(self, header: str, rest: str) -> int:
        """How much of the text before an answer stands in the conversation too.

        Usually all. Some templates open a block for the model ("<think>") that a finished answer does not have:
        then what is shared ends with a line or with a token of its own, never in the middle of the answer's text.
        """
        for size in range(len(header), 0, -1):
            part = header[:size]
            whole = size == len(header) or part.endswith("\n") or any(part.endswith(token) for token in self._added)
            if whole and rest.startswith(part):
                return size
        return 0

    def _answer_stop(self, full: str, start: int, place: Place) -> int:
        at = full.find(self.end_of_turn, start)
        if at < 0:
            raise self._endless(place)
        return at + len(self.end_of_turn)

    def _endless(self, place: Place) -> DataError:
        found = f"an answer that the chat template does not end with {self.end_of_turn}"
        return place.fault("chat template", found, f"{self.end_of_turn}, as after other answers")

    def _check_texts(self, messages: Sequence[Message], place: Place) -> None:
        """Refuses control tokens in the data's own text: they would end turns, or begin them, where none does."""
        for message in messages:
            match = self._control and self._control.search(message.content + "\n" + message.calls_text)
            if match:
                found = f"the control token {match[0]} in the text of a {message.role} message"
                mend = "Delete it; a text that is already rendered should be given as messages"
                raise place.fault("control token in text", found, "plain text", mend)

    def _check_complete(self, messages: Sequence[Message], text: str, place: Place) -> None:
        for message in messages:
            if message.role in ("system", "user") and message.content.strip() not in text:
                found = f"a {message.role} message that the chat template leaves out or changes"
                raise place.fault("chat template", found, "a template that writes it", "Delete the message")

    def _probe_end_of_turn(self) -> str:
        """Finds the token that ends an answer, and the header of templates that ignore `add_generation_prompt`."""
        text = self._apply(as_chat([QUESTION, ANSWER], native=True))
        at = text.find(ANSWER.content)
        before = self.render([QUESTION])
        if self.render([QUESTION], generation=True) == before and text.startswith(before):
            between = text[len(before) : at]
            self._header = between if between.strip() else ""
        tail = text[at + len(ANSWER.content) :]
        found = [(tail.find(token), -len(token), token) for token in self._added if token in tail]
        if at < 0 or not found:
            raise ValueError(
                f"the tokenizer's chat template ends an answer with {tail!r}, in which no token of its own marks the "
                "end, so a model could never learn to stop; expected the EOS or another special token there"
            )
        return min(found)[2]

    @cached_property
    def _context_free(self) -> bool:
        """Whether a text's ids are the same alone and after a prompt (not so where a blank is put before a text)."""
        before = self.render([QUESTION], generation=True)
        text = self.render([QUESTION, ANSWER])
        text = text[len(before) :] if text.startswith(before) else ANSWER.content
        return np.array_equal(np.concatenate([self._ids(before), self._ids(text)]), self._ids(before + text))

    @cached_property
    def _encoder(self) -> Tokenizer:
        """The tokenizer's own tokenisation, without post-processing: that would only trim blanks off the offsets."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        encoder.post_processor = None
        encoder.no_padding()
        encoder.no_truncation()
        return encoder

    def _encode(self, text: str) -> Encoding:
        return self._encoder.encode(text, add_special_tokens=False)

    def _apply(self, chat: list[dict], tools: Sequence[dict] = (), *, generation: bool = False) -> str:
        options: dict[str, Any] = {"tools": list(tools) or None, "add_generation_prompt": generation}
        return cast(str, self.tokenizer.apply_chat_template(chat, tokenize=False, **options))

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._encode(text).ids, dtype=np.int32)


def _mark(offsets: np.ndarray, spans: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The span that each token belongs to: a token is a span's if it holds any of its characters."""
    turns = np.full(len(offsets), -1, dtype=np.int32)
    for start, stop, number in spans:
        turns[(offsets[:, 0] < stop) & (offsets[:, 1] > start)] = number
    return turns
