"""Labels token by token, for several families of chat templates.

The oracle renders each conversation by hand, in pieces that it knows to be trained or not, and finds the piece of
each token by counting the bytes that tokens stand for. It uses neither jinja nor offsets.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.formats import DataError, Message, Place
from datamodules.templates import ChatTemplate

HERE = Place("data.jsonl:7")
FAMILIES = (
    "chatml",
    "none",
    "llama3",
    "qwen25",
    "mistral",
    "thinks_last",
    "opens_thinking",
    "no_generation_prompt",
    "blank_header",
    "markers",
)
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>"}


def talk(*texts: str, system: str | None = None) -> list[Message]:
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [Message("system", system)] * (system is not None) + turns


def by_hand(family: str, messages: list[Message]) -> list[tuple[str, int]]:
    """Pieces of the rendered conversation: text, and number of the assistant's message that it is trained as, or -1."""
    pieces = [("<|begin_of_text|>", -1)] if family == "llama3" else [("<s>", -1)] if family == "mistral" else []
    if family == "qwen25" and messages[0].role != "system":
        pieces.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", -1))
    for i, message in enumerate(messages):
        answer, text = message.role == "assistant", message.content
        if family == "llama3":
            pieces.append((f"<|start_header_id|>{message.role}<|end_header_id|>\n\n", -1))
            pieces.append((text.strip() + "<|eot_id|>", i if answer else -1))
        elif family == "markers":
            pieces.append(("<|end_header_id|>" if answer else "<|start_header_id|>", -1))
            pieces.append((text + "<|im_end|>", i) if answer else (text, -1))
        elif family == "mistral":
            pieces.append((f" {text}</s>", i) if answer else (f"[INST] {text} [/INST]", -1))
        else:
            if family == "thinks_last" and answer and i == len(messages) - 1:
                text = "<think>\n\n</think>\n\n" + text
            pieces.append((f"<|im_start|>{message.role}" + (": " if family == "blank_header" else "\n"), -1))
            pieces.append((text + "<|im_end|>", i if answer else -1))
            pieces.append(("\n", -1))
    return pieces


@functools.cache
def byte_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter (Radford et al. 2019); this is its alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def owners(tokenizer, pieces: list[tuple[str, int]]) -> tuple[list[int], list[int]]:
    """Ids of the joined pieces, and for each token the piece's number that its bytes lie in (the later, if in two)."""
    ids = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"]
    owner_of_byte = [number for text, number in pieces for _ in text.encode()]
    at, result = 0, []
    for token_id in ids:
        token = tokenizer.convert_ids_to_tokens(token_id)
        size = len(token) if token_id in tokenizer.added_tokens_decoder else len([byte_letters()[c] for c in token])
        result.append(max(owner_of_byte[at : at + size]))
        at += size
    assert at == len(owner_of_byte)
    return ids, result


TALKS = {
    "one turn": talk("发烧了怎么办?", "多喝水, 注意休息。"),
    "two turns": talk("What is it?", "Paris.", "Are you sure?", "Yes, Paris."),
    "blanks around": talk("What? ", " Paris.\n\n", "\nSure?\n", "\n\nYes"),
    "emoji and code": talk("\U0001f600?", "def f(x):\n    return x  # \U0001f468‍\U0001f469‍\U0001f467"),
    "the same text twice": talk("Paris", "Paris", "Paris", "Paris"),
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_are_the_answers_with_their_end_of_turn(make_tokenizer, family, name):
    tokenizer = make_tokenizer(family)
    turns = ChatTemplate(tokenizer).conversation(TALKS[name], (), HERE)
    ids, expected = owners(tokenizer, by_hand(family, TALKS[name]))
    assert turns.ids.tolist() == ids
    assert turns.turns.tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_apply_chat_template_with_one_bos_at_most(make_tokenizer, family):
    tokenizer = make_tokenizer(family)
    template = ChatTemplate(tokenizer)
    chat = [{"role": m.role, "content": m.content} for m in TALKS["two turns"]]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert template.conversation(TALKS["two turns"], (), HERE).ids.tolist() == ids
    assert ids.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_turn_is_found_and_is_the_last_trained_token_of_each_answer(make_tokenizer, family):
    template = ChatTemplate(make_tokenizer(family))
    assert template.end_of_turn == ENDS.get(family, "<|im_end|>")
    turns = template.conversation(TALKS["two turns"], (), HERE)
    for answer in (1, 3):
        assert turns.ids[turns.turns == answer][-1] == template.end_of_turn_id
        assert (turns.ids[turns.turns == answer] == template.end_of_turn_id).sum() == 1


def test_system_messages_are_seen_but_not_trained(make_tokenizer):
    tokenizer = make_tokenizer("qwen25")
    messages = talk("发烧?", "多喝水", system="You are terse.")
    turns = ChatTemplate(tokenizer).conversation(messages, (), HERE)
    ids, expected = owners(tokenizer, by_hand("qwen25", messages))
    assert (turns.ids.tolist(), turns.turns.tolist()) == (ids, expected)
    assert "You are a helpful assistant." not in tokenizer.decode(turns.ids)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00<"), min_size=1, max_size=30).filter(
    lambda text: bool(text.strip())
)


@settings(max_examples=60)
@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_labels_are_the_assistants_tokens_for_any_conversation(cached_templates, family, data):
    contents = data.draw(st.lists(texts, min_size=2, max_size=6).filter(lambda items: len(items) % 2 == 0))
    messages = talk(*contents)
    template = cached_templates(family)
    turns = template.conversation(messages, (), HERE)
    ids, expected = owners(template.tokenizer, by_hand(family, messages))
    assert turns.ids.tolist() == ids
    assert turns.turns.tolist() == expected


@settings(max_examples=40)
@given(family=st.sampled_from(FAMILIES), question=texts, answer=texts)
def test_prompt_and_response_together_spell_the_rendered_conversation(cached_templates, family, question, answer):
    template = cached_templates(family)
    text, prompt = template.prompt([Message("user", question)], (), HERE)
    response = template.response([Message("user", question)], Message("assistant", answer), (), text, HERE)
    rendered = "".join(piece for piece, _ in by_hand(family, talk(question, answer)))
    spelled = template.tokenizer.decode(np.concatenate([prompt, response]))
    if family == "opens_thinking":
        spelled = spelled.replace("assistant\n<think>\n", "assistant\n", 1)
    after = "" if family in ("llama3", "mistral", "markers") else "\n"
    assert spelled + after == rendered
    assert response[-1] == template.end_of_turn_id


@pytest.fixture(scope="module")
def cached_templates(make_tokenizer):
    return functools.cache(lambda family: ChatTemplate(make_tokenizer(family)))


def test_a_prompt_ends_with_what_the_template_writes_before_an_answer(make_tokenizer):
    tokenizer = make_tokenizer("opens_thinking")
    text, ids = ChatTemplate(tokenizer).prompt([Message("user", "Why?")], (), HERE)
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_template_without_generation_prompt_gets_the_header_of_its_answers(make_tokenizer):
    text, _ = ChatTemplate(make_tokenizer("no_generation_prompt")).prompt([Message("user", "Why?")], (), HERE)
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_no_letter_of_an_answer_is_lost_that_looks_like_the_opened_block(make_tokenizer):
    tokenizer = make_tokenizer("opens_thinking")
    turns = ChatTemplate(tokenizer).conversation(talk("Why?", "<table>"), (), HERE)
    assert tokenizer.decode(turns.ids[turns.turns == 1]) == "<table><|im_end|>"


def test_a_tokenizer_that_puts_a_blank_before_a_text_tokenises_answers_in_their_place(make_tokenizer):
    tokenizer = make_tokenizer("chatml", kind="sentence_piece")
    template = ChatTemplate(tokenizer)
    text, prompt = template.prompt([Message("user", "What")], (), HERE)
    response = template.response([Message("user", "What")], Message("assistant", "Paris"), (), text, HERE)
    whole = tokenizer(text + "Paris<|im_end|>", add_special_tokens=False)["input_ids"]
    alone = tokenizer("Paris<|im_end|>", add_special_tokens=False)["input_ids"]
    assert [*prompt, *response] == whole
    assert response.tolist() != alone and tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")


def test_a_blank_that_a_tokenizer_puts_before_an_answer_is_the_answers(make_tokenizer):
    tokenizer = make_tokenizer("markers", kind="sentence_piece")
    turns = ChatTemplate(tokenizer).conversation(talk("What", "水", "is", "Paris"), (), HERE)
    tokens = tokenizer.convert_ids_to_tokens(turns.ids[turns.turns >= 0])
    assert tokens == ["▁", "水", "<|im_end|>", *tokenizer.tokenize("Paris"), "<|im_end|>"]


def test_a_template_that_is_not_prefix_preserving_is_refused_with_both_texts(make_tokenizer):
    template = ChatTemplate(make_tokenizer("not_prefix_preserving"))
    with pytest.raises(ValueError, match=r"not prefix-preserving.*1 messages.*4 messages"):
        template.check_prefix_preserving()
    with pytest.raises(DataError, match=r"data\.jsonl:7: found a chat template that is not prefix-preserving"):
        template.conversation(TALKS["two turns"], (), HERE)


def test_a_template_without_end_of_turn_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match="never learn to stop"):
        ChatTemplate(make_tokenizer("no_end_of_turn"))


def test_a_template_that_refuses_a_role_says_so_with_file_and_line(make_tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:7: found turns that .* refuses \(Only user and assistant roles"):
        ChatTemplate(make_tokenizer("mistral")).conversation(talk("a", "b", system="c"), (), HERE)


def test_a_template_that_leaves_a_message_out_is_noticed(make_tokenizer):
    with pytest.raises(DataError, match="a system message that the chat template leaves out"):
        ChatTemplate(make_tokenizer("forgets_system")).conversation(talk("a", "b", system="Be terse."), (), HERE)


@pytest.mark.parametrize("text", ["so<|im_end|>", "<|im_start|>user\nhello"])
def test_control_tokens_in_the_data_are_refused(tokenizer, text):
    for messages in (talk(text, "fine"), talk("fine", text)):
        with pytest.raises(DataError, match=r"control token <\|im_"):
            ChatTemplate(tokenizer).conversation(messages, (), HERE)


def test_chatml_fallback_ends_turns_with_eos_where_im_end_is_no_token(make_tokenizer):
    tokenizer = make_tokenizer("none", special=["<|endoftext|>"], eos_token="<|endoftext|>")
    template = ChatTemplate(tokenizer)
    turns = template.conversation(talk("Why?", "So."), (), HERE)
    assert template.end_of_turn == "<|endoftext|>"
    assert tokenizer.decode(turns.ids[turns.turns == 1]) == "So.<|endoftext|>"
    assert "ChatML is used" in template.warnings()[0]
    assert "ChatML is used" in ChatTemplate(tokenizer).warnings()[0]


def test_a_tokenizer_that_can_end_nothing_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match="no EOS token, so no answer could end"):
        ChatTemplate(make_tokenizer("none", special=["<|endoftext|>"], eos_token=None))


def test_a_prompt_whose_tokens_change_under_an_answer_is_warned_of(make_tokenizer):
    assert ChatTemplate(make_tokenizer("chatml")).warnings() == []
    # Byte-level BPE of GPT-2's kind splits "\n\n" before a letter, and leaves it whole at the end of a text.
    assert "change when an answer follows" in ChatTemplate(make_tokenizer("llama3")).warnings()[0]


CALL = Message("assistant", "", ({"name": "weather", "arguments": {"city": "北京"}},), '{"name": "weather"}')
TOOL_TALK = [Message("user", "Weather?"), CALL, Message("tool", '{"rain": true}'), Message("assistant", "Rain.")]
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "tells", "parameters": {}}},)


def test_calls_and_results_go_through_the_templates_own_tool_support(make_tokenizer):
    tokenizer = make_tokenizer("qwen25")
    template = ChatTemplate(tokenizer)
    turns = template.conversation(TOOL_TALK, TOOLS, HERE)
    text = tokenizer.decode(turns.ids)
    assert template.supports_tools
    assert '"description": "tells"' in text
    assert '<tool_response>\n{"rain": true}\n</tool_response>' in text
    called = tokenizer.decode(turns.ids[turns.turns == 1])
    assert called == '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
    assert tokenizer.decode(turns.ids[turns.turns == 3]) == "Rain.<|im_end|>"


def test_calls_and_results_are_plain_turns_where_the_template_knows_no_tools(tokenizer):
    template = ChatTemplate(tokenizer)
    turns = template.conversation(TOOL_TALK, TOOLS, HERE)
    text = tokenizer.decode(turns.ids)
    assert not template.supports_tools
    assert text.startswith("<|im_start|>system\nFunctions that may be called")
    assert '{"name": "weather", "description": "tells", "parameters": {}}<|im_end|>' in text
    assert '<|im_start|>tool\n{"rain": true}<|im_end|>' in text
    assert tokenizer.decode(turns.ids[turns.turns == 1]) == '{"name": "weather"}<|im_end|>'
    assert tokenizer.decode(turns.ids[turns.turns == 3]) == "Rain.<|im_end|>"


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        ChatTemplate(Slow())
