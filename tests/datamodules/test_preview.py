"""A preview shows the batch that is really made: its tokens, weights, positions and stretches, and escapes the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from datamodules.pieces import printable, token_texts, visible

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def talk(*turns, system=None, **more):
    names = ("human", "gpt")
    messages = [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"conversations": ([{"from": "system", "value": system}] if system else []) + messages, **more}


def pair(question, chosen="good answer", rejected="bad", **more):
    return {"question": question, "response_chosen": chosen, "response_rejected": rejected, **more}


@pytest.fixture
def make(write, tokenizer):
    def make(module, *records, **options):
        return module(**{"tokenizer": tokenizer, "train": write("a.jsonl", *records)} | options)

    return make


TALKS = [
    talk(f"q{i} ⟦" * (1 + i % 3), f"answer {i}\n", "and 发烧?", f"多喝水 {i}", system="Be kind.") for i in range(9)
]


PAIRS = [pair(f"q{i}", "ok " * (1 + i)) for i in range(9)]


def marked(text):
    """What stands between the signs in the part of a preview that shows texts."""
    return "".join(re.findall("⟦(.*?)⟧", text))


def test_the_trained_text_is_exactly_the_assistants(make):
    preview = make(SFTDataModule, *TALKS, batch_size=4).preview(9)
    assert len(preview.examples) == 9
    for view in preview.examples:
        record = TALKS[int(view.origin.rpartition(":")[2]) - 1]
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        trained = "".join(token.text for part in view.parts for token in part.tokens if token.weight > 0)
        assert trained == "".join(answer + "<|im_end|>" for answer in answers)
    text = preview.text().split("example 1:")[1].split("  tokens\n")[0]
    first = TALKS[int(preview.examples[0].origin.rpartition(":")[2]) - 1]
    answers = [turn["value"] for turn in first["conversations"] if turn["from"] == "gpt"]
    assert marked(text) == "".join(answer.replace("\n", "↵") + "<|im_end|>" for answer in answers)


def test_a_sign_of_ours_in_the_data_is_escaped(make):
    text = make(SFTDataModule, talk("a⟦b⟧", "c")).preview(1)
    assert "a\\u27e6b\\u27e7" in text.text() and "a⟦b⟧" in ANSI.sub("", text.text(color=True))


def attention(segments, length):
    """True = may see, bool [T, T], from what the segments say."""
    sees = torch.zeros(length, length, dtype=torch.bool)
    for segment in segments:
        here = slice(segment.start, segment.stop)
        sees[here, here] = torch.ones(segment.stop - segment.start, segment.stop - segment.start).tril().bool()
        sees[here, segment.prefix_start : segment.prefix_stop] = True
    return sees


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("module, records", [(SFTDataModule, TALKS), (PreferenceDataModule, PAIRS)])
@pytest.mark.parametrize("ranks, micro", [(1, 1), (2, 2)])
def test_tokens_lie_where_they_lie_in_the_batches_of_the_loaders(make, module, records, layout, ranks, micro):
    data = make(module, *records, batch_size=4, layout=layout, padding_side="left")
    views = iter(data.preview(99, world_size=ranks, micro_batches=micro).examples)
    data.setup("fit")
    iterators = []
    for rank in range(ranks):
        loader = data.loader("train", shuffle=True)
        loader.rank, loader.world_size, loader.micro_batches = rank, ranks, micro
        iterators.append(iter(loader))
    seen = 0
    for batches in zip(*iterators, strict=True):
        for batch in batches:
            weights = torch.zeros(batch.input_ids.numel())
            sources = torch.full((batch.input_ids.numel(),), -1)
            for i in range(batch.num_examples):
                view = next(views)
                assert view.index == int(batch.indices[i]) and view.origin == data.datasets["train"].origin(view.index)
                for part in view.parts:
                    assert [token.place for token in part.tokens] == [*range(part.start, part.stop)]
                    for token in part.tokens:
                        assert token.id == batch.input_ids[part.row, token.place]
                        assert token.position == batch.position_ids[part.row, token.place]
                        flat = part.row * batch.input_ids.shape[1] + token.place
                        weights[flat] = token.weight
                        if token.weight > 0:
                            first = token.place == part.start and part.prefix
                            sources[flat] = flat - token.place + (part.prefix[1] - 1 if first else token.place - 1)
                if batch.segments is not None:
                    check_sight(view, batch)
                seen += 1
            assert weights[weights > 0].tolist() == batch.scored.weights.tolist()
            assert sources[weights > 0].tolist() == batch.scored.sources.tolist()
            assert batch.input_ids.flatten()[weights > 0].tolist() == batch.scored.targets.tolist()
    assert seen == 9


def check_sight(view, batch):
    """What the parts say about who sees whom is what the batch's segments say."""
    sees = attention(batch.segments, batch.input_ids.shape[1])
    for part in view.parts:
        told = {*range(*part.prefix)} if part.prefix else set()
        for row in range(part.start, part.stop):
            assert set(torch.nonzero(sees[row])[:, 0].tolist()) == told | {*range(part.start, row + 1)}


def test_the_first_examples_are_those_of_the_first_batch(make):
    data = make(SFTDataModule, *TALKS, batch_size=3, seed=5)
    shown = [view.index for view in data.preview(4).examples]
    data.setup("fit")
    order = [index for batch in data.train_dataloader() for index in batch.indices.tolist()]
    assert shown == order[:4] and order != sorted(order)


@pytest.mark.parametrize("ranks, micro", [(1, 1), (2, 2)])
def test_streamed_examples_are_those_that_the_stream_hands_out(make, ranks, micro):
    data = make(SFTDataModule, *TALKS, batch_size=4, streaming=True, stream_window=6)
    preview = data.preview(9, world_size=ranks, micro_batches=micro)
    assert "first 9 examples" in preview.title
    shown = iter(preview.examples)
    data.setup("fit")
    iterators = []
    for rank in range(ranks):
        loader = data.train_loader()
        stream = loader.stream
        stream.rank, stream.world_size, stream.micro_batches = rank, ranks, micro
        iterators.append(iter(loader))
    seen = 0
    while seen < 9:
        for batches in zip(*[[next(iterator) for _ in range(micro)] for iterator in iterators], strict=True):
            for batch in batches:
                for number in range(batch.num_examples):
                    (part,) = next(shown).parts
                    assert [token.id for token in part.tokens] == batch.input_ids[0, part.start : part.stop].tolist()
                    assert part.stop == int(batch.ends[number]) + 1
                    seen += 1
    assert seen == 9


def roles(view):
    """Runs of equal roles with their text."""
    runs = []
    for part in view.parts:
        for token in part.tokens:
            if not runs or runs[-1][0] != token.role:
                runs.append([token.role, ""])
            runs[-1][1] += token.text
    return [tuple(run) for run in runs]


def test_roles_are_those_of_the_messages(make):
    record = talk("Hi", "Hello", "Who?", "Me", system="Be kind.")
    assert roles(make(SFTDataModule, record).preview(1).examples[0]) == [
        ("system", "<|im_start|>system\nBe kind.<|im_end|>\n"),
        ("user", "<|im_start|>user\nHi<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nHello<|im_end|>\n"),
        ("user", "<|im_start|>user\nWho?<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nMe<|im_end|>\n"),
    ]
    record = pair("Who?", "Me", "You", system="Be kind.", history=[["Hi", "Hello"]], weight=2, margin=0.5)
    view = make(PreferenceDataModule, record).preview(1).examples[0]
    assert [role for role, _ in roles(view)] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "chosen",
        "rejected",
    ]
    assert [text for _, text in roles(view)][-3:] == ["<|im_start|>assistant\n", "Me<|im_end|>", "You<|im_end|>"]
    assert view.values == {"margin": 0.5, "weight": 2.0}


@pytest.mark.parametrize(
    "family, expected",
    [
        ("qwen25", ["template", "user", "assistant"]),
        ("llama3", ["template", "user", "assistant"]),
        ("mistral", ["template", "user", "assistant"]),
        ("chatml", ["user", "assistant"]),
        ("thinks_last", ["user", "assistant"]),
    ],
)
def test_what_a_template_writes_by_itself_is_nobodys(make, make_tokenizer, family, expected):
    view = make(SFTDataModule, talk("Hi", "Hello"), tokenizer=make_tokenizer(family)).preview(1).examples[0]
    assert [role for role, _ in roles(view)] == expected
    if family == "qwen25":
        assert roles(view)[0][1] == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_roles_of_cut_examples_are_still_known(make):
    record = talk("word " * 90, "answer " * 90, system="Be kind.")
    view = make(SFTDataModule, record, max_length=64, overlong="truncate").preview(1).examples[0]
    assert len(view.parts[0].tokens) == 64
    assert [role for role, _ in roles(view)] == ["user", "assistant"]
    view = make(PreferenceDataModule, pair("word " * 90), max_length=40, overlong="truncate").preview(1).examples[0]
    assert [role for role, _ in roles(view)] == ["user", "assistant", "chosen", "rejected"]


def test_without_a_terminal_there_is_no_code_and_with_one_the_text_is_the_same(make):
    preview = make(
        SFTDataModule, *[talk(f"q{i}\n\nx", f"answer {i}\n", "and 发烧?", "多喝水") for i in range(9)]
    ).preview(2)
    plain, colored = preview.text(), preview.text(color=True)
    assert "\x1b" not in plain and "\x1b[1;32m" in colored
    bare = ANSI.sub("", colored).splitlines()[2:]
    assert bare == [re.sub("[⟦⟧]", "", line) for line in plain.splitlines()[2:]]
    assert plain.splitlines()[1].startswith("legend: ⟦trained⟧") and "legend: \x1b[1;32mtrained" in colored


def test_text_and_prompts_have_previews_too(make, tokenizer):
    data = make(PretrainDataModule, {"text": "one two"}, {"text": "three"}, block_size=512, tokenizer=tokenizer)
    (view,) = data.preview(3).examples
    assert roles(view) == [("text", "one two"), ("end of document", "<|im_end|>"), ("text", "three")]
    assert [token.weight for token in view.parts[0].tokens] == [0.0] + [1.0] * (len(view.parts[0].tokens) - 1)
    (view,) = make(PromptDataModule, {"question": "Why?", "answer": 1}).preview(1).examples
    assert roles(view) == [("user", "<|im_start|>user\nWhy?<|im_end|>\n"), ("assistant", "<|im_start|>assistant\n")]
    assert all(token.weight == 0 for token in view.parts[0].tokens)


def test_held_out_data_can_be_seen_and_data_that_is_not_there_is_told(make, write):
    data = make(SFTDataModule, *TALKS, validation=0.3, test=write("b.jsonl", talk("other", "x")))
    held_out = [view.origin for view in data.preview(99, "validation").examples]
    assert 0 < len(held_out) < 9
    assert not set(held_out) & {view.origin for view in data.preview(99, "train").examples}
    assert data.preview(1, "test").examples[0].origin.endswith("b.jsonl:1")
    for arguments, message in (
        ((1, "predict"), "no predict data"),
        ((0, "train"), "n: expected"),
        ((1, "x"), "split: "),
    ):
        with pytest.raises(ValueError, match=message):
            data.preview(*arguments)


class Page(HTMLParser):
    """Collects tags, and the text of tokens by whether they are marked as trained."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.tokens, self._inside = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        kind = dict(attrs).get("class") or ""
        if tag == "span" and kind.startswith("t ") and "title" in dict(attrs):
            self._inside = kind == "t y"
            self.tokens.append([self._inside, ""])

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is not None:
            self.tokens[-1][1] += data


ATTACK = "<script>alert(1)</script><img src=http://x/y onerror=a>\" ' & \x1b[31m"


def test_the_page_escapes_everything_and_needs_nothing_else(make, write):
    path = write("<b>&.jsonl", talk(ATTACK, ATTACK + "\n\n  two"))
    html = make(SFTDataModule, train=path).preview(1).html()
    page = Page()
    page.feed(html)
    ours = "html head meta title style body h1 h2 p section span div table tr th td details summary"
    assert {*page.tags} <= {*re.findall(r"\w+", ours)}
    assert not [name for name, _ in page.attributes if name in ("src", "href", "onerror", "style")]
    assert "\x1b" not in html and "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html and "&lt;b&gt;&amp;.jsonl" in html
    trained = "".join(text for is_trained, text in page.tokens if is_trained)
    assert trained.replace("·", " ") == ATTACK.replace("\x1b", "\\x1b") + "↵\n↵\n  two<|im_end|>"
    assert page.tokens[0] == [False, "<|im_start|>"]


def test_line_breaks_and_blanks_are_visible(make):
    html = make(SFTDataModule, talk("a", "b\n\n\tc")).preview(1).html()
    assert "↵\n" in html and "⇥" in html
    assert visible("\n") == "↵" and visible(" a\t") == "·a⇥" and visible("") == "⋯"
    assert printable("a\u202eb\u3000\x07\n") == "a\\u202eb\u3000\\x07\n"


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize(
    "text", ["发烧了怎么办? 🩺 ok", "  two  blanks\n\n", "naïve � x", "", "\ufffd\ufffd\ufffd\ufffd\ufffd end"]
)
def test_token_texts_together_are_the_decoded_text(make_tokenizer, kind, text):
    tokenizer = make_tokenizer(kind=kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if kind == "byte_level" and text.startswith("发"):
        assert "🩺" in texts and "" in texts


@pytest.mark.real_data
@pytest.mark.parametrize(
    "module, name",
    [
        (SFTDataModule, "sft/toolcall_zh.jsonl"),
        (SFTDataModule, "sft/medical_sft.jsonl"),
        (PreferenceDataModule, "preference/dpo_zh.jsonl"),
        (PromptDataModule, "prompts/medical_qa.jsonl"),
    ],
)
def test_real_records_are_shown_whole_with_known_roles(shared_data, make, module, name):
    data = make(module, train=str(shared_data / name), max_length=1 << 16, batch_size=4)
    preview = data.preview(4)
    data.setup("fit")
    for view in preview.examples:
        for part in view.parts:
            ids = [token.id for token in part.tokens]
            assert "".join(token.text for token in part.tokens) == data.tokenizer.decode(ids)
            assert {token.role for token in part.tokens} <= {
                "system",
                "user",
                "assistant",
                "tool",
                "template",
                part.name,
            }
    assert preview.html().count("<section>") == 4
