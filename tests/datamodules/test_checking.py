"""A check reads everything, names every fault, and its numbers are those of the batches that are really made."""

from __future__ import annotations

import json
import math
from copy import copy

import pytest

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from lit_align.batch import pack, pad


def talk(question, answer="yes", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def pair(question, chosen="good", rejected="bad", **more):
    return {"question": question, "response_chosen": chosen, "response_rejected": rejected, **more}


@pytest.fixture
def make(tokenizer):
    def make(module, **options):
        return module(**({"tokenizer": tokenizer} | options))

    return make


SFT_FAULTS = {
    "unknown role": ({"conversations": [{"from": "assitant", "value": "x"}]}, "conversations[0].from", "assistant"),
    "missing field": ({"conversation": []}, "", "one of the fields conversations"),
    "empty field": (talk(" "), "conversations[0].value", "a text"),
    "wrong type": (talk(7), "conversations[0].value", "text"),
    "roles out of order": ({"conversations": [{"from": "human", "value": "x"}]}, "conversations", "ends with"),
    "NUL character": (talk("a\x00b"), "conversations[0].value", "text"),
    "control token in text": (talk("a<|im_end|>b"), "", "plain text"),
    "no trained token": (talk("q", weight=0), "", "at least one"),
    "wrong value": (talk("q", weight=-1), "weight", "at least 0"),
    "overlong": (talk("q" * 3000), "", "at most 200"),
}


@pytest.mark.parametrize("reason", SFT_FAULTS)
def test_each_fault_is_told_with_file_line_field_found_and_expected(make, write, reason):
    record, field, expected = SFT_FAULTS[reason]
    path = write("a.jsonl", talk("fine"), record, talk("fine too"))
    report = make(SFTDataModule, train=path, max_length=200).check()
    assert report.reasons == {reason: 1} and not report.ok
    ((split, fault),) = report.faults
    assert (split, fault.origin, fault.field) == ("train", f"{path}:2", field)
    assert expected in fault.expected and fault.found
    lines = str(report).splitlines()
    at = lines.index(f"  {path}:2{': ' if field else ''}{field}  (train)")
    assert lines[at + 1] == f"    found:    {fault.found}" and lines[at + 2] == f"    expected: {fault.expected}"


@pytest.mark.parametrize(
    "content, line, reason",
    [
        ("", "", "empty file"),
        (b'{"a": \xff}\n', ":1", "encoding"),
        ('{"conversations": [\n', ":1", "invalid JSON"),
    ],
)
def test_faults_of_files_are_told_and_the_other_files_are_still_read(make, write, content, line, reason):
    broken, fine = write("broken.jsonl", content), write("fine.jsonl", talk("a"), talk(""))
    report = make(SFTDataModule, train=[broken, fine]).check()
    assert report.reasons == {reason: 1, "empty field": 1}
    assert [fault.origin for _, fault in report.faults] == [f"{broken}{line}", f"{fine}:2"]
    assert report.splits["train"].report.examples == 1


def test_faults_stand_in_the_order_of_files_and_lines_whoever_found_them(make, write):
    bad = json.dumps(talk("")).encode()
    first, second = write("z.jsonl", bad + b"\n\xff\n" + bad), write("a.jsonl", b"\xff\n" + bad)
    faults = [fault.origin for _, fault in make(SFTDataModule, train=[first, second]).check().faults]
    assert faults == [f"{first}:1", f"{first}:2", f"{first}:3", f"{second}:1", f"{second}:2"]


def test_pairs_with_equal_answers_are_faults(make, write):
    path = write("a.jsonl", pair("a"), pair("b", "same", "same"), pair("c", "x", "x "))
    report = make(PreferenceDataModule, train=path).check()
    assert report.reasons == {"equal answers": 2}
    assert [fault.field for _, fault in report.faults] == ["response_rejected", "response_rejected"]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_policy_stops_it_at_the_first_fault(make, write, on_error):
    path = write("a.jsonl", talk(""), talk("ok"), talk("x" * 3000), talk(""))
    report = make(SFTDataModule, train=path, test=write("b.jsonl", talk("")), on_error=on_error).check()
    assert report.reasons == {"empty field": 3, "overlong": 1}
    assert [(split, fault.origin.rpartition(":")[2]) for split, fault in report.faults] == [
        ("train", "1"),
        ("train", "3"),
        ("train", "4"),
        ("test", "1"),
    ]
    assert "problem: the test data holds no record that can be used" in str(report)


def test_the_limit_bounds_what_is_shown_and_a_common_fault_hides_no_rare_one(make, write):
    path = write("a.jsonl", *[talk("")] * 30, talk("ok"), {"x": 1})
    data = make(SFTDataModule, train=path)
    shown = [fault.origin.rpartition(":")[2] for _, fault in data.check(limit=3).faults]
    assert shown == ["1", "2", "32"]
    text = str(data.check(limit=3))
    assert "faults: 31 (30 empty field, 1 missing field)" in text and "... and 28 more" in text
    assert data.check(limit=0).faults == [] and not data.check(limit=0).ok
    assert len(data.check().faults) == 20
    with pytest.raises(ValueError, match="limit: expected at least 0, got -1"):
        data.check(limit=-1)


def test_nothing_is_left_behind_and_the_data_module_stays_as_it_was(make, write, tmp_path):
    data = make(SFTDataModule, train=write("a.jsonl", *[talk(f"q{i}") for i in range(9)], talk("")), validation=0.2)
    data.tokenizer  # noqa: B018 (loaded before, for it stays)
    before = copy(vars(data))
    data.check()
    assert vars(data) == before
    assert [path.name for path in (tmp_path / "cache" / "data").iterdir()] == []


def ids_of(tokenizer, record):
    names = {"human": "user", "gpt": "assistant"}
    chat = [{"role": names[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)


RECORDS = [talk("q" * (1 + 17 * i % 90), "word " * (1 + 29 * i % 70)) for i in range(40)]


@pytest.mark.parametrize("overlong", ["raise", "drop", "truncate"])
def test_lengths_are_those_before_the_policy_and_too_long_ones_are_counted(make, write, tokenizer, overlong):
    lengths = sorted(len(ids_of(tokenizer, record)) for record in RECORDS)
    limit = lengths[25]
    data = make(SFTDataModule, train=write("a.jsonl", *RECORDS), max_length=limit, overlong=overlong)
    report = data.check()
    split = report.splits["train"]
    ranks = [math.ceil(share * len(lengths)) - 1 for share in (0.5, 0.9, 0.99)]
    assert [*vars(split.spreads["example"]).values()] == [lengths[0], *(lengths[r] for r in ranks), lengths[-1]]
    too_long = sum(length > limit for length in lengths)
    assert 0 < too_long < 40 and split.too_long == too_long
    assert report.reasons == ({"overlong": too_long} if overlong == "raise" else {})
    assert report.ok == (overlong != "raise")
    assert split.report.examples == (40 if overlong == "truncate" else 40 - too_long)
    assert split.report.dropped == ({} if overlong == "truncate" else {"overlong": too_long})
    assert (sum(split.report.cut.values()) >= too_long) == (overlong == "truncate")
    assert f"{too_long} longer (overlong: {overlong}" in str(report)


@pytest.mark.parametrize("options", [{}, {"overlong": "drop"}, {"overlong": "truncate"}])
def test_its_counts_are_those_of_a_run_that_skips(make, write, options):
    path = write("a.jsonl", *RECORDS, talk(""), {"x": 1}, "x")
    options = {"train": path, "validation": 0.25, "on_error": "skip", "max_length": 100} | options
    checked = make(SFTDataModule, **options).check()
    run = make(SFTDataModule, **options | ({} if options.get("overlong") else {"overlong": "drop"}))
    run.setup("fit")
    for split, report in run.report.splits.items():
        assert checked.splits[split].report == report
    assert checked.splits["validation"].report.examples > 0


def computed(data, layout, ranks, micro):
    """Tokens of every micro-batch of the first epoch, as the loaders of all ranks make them."""
    sizes, useful = [], 0
    for rank in range(ranks):
        loader = data.loader("train", shuffle=True)
        loader.rank, loader.world_size, loader.micro_batches = rank, ranks, micro
        for batch in loader:
            examples = [data.datasets["train"][i] for i in batch.indices.tolist()]
            made = (pack if layout == "packed" else pad)(examples, batch.indices.tolist(), batch.totals)
            sizes.append(made.input_ids.numel())
            useful += made.num_tokens
    return sizes, useful


@pytest.mark.parametrize("module, record", [(SFTDataModule, talk), (PreferenceDataModule, pair)])
@pytest.mark.parametrize("size", [{"batch_size": 5}, {"max_tokens": 150}])
@pytest.mark.parametrize("ranks, micro", [(1, 1), (2, 3)])
def test_costs_are_those_of_the_batches_that_the_loaders_make(make, write, module, record, size, ranks, micro):
    records = [record(f"{i} " * (1 + 7 * i % 11), "word " * (1 + 5 * i % 13)) for i in range(23)]
    data = make(module, train=write("a.jsonl", *records), **size)
    cost = data.check(world_size=ranks, micro_batches=micro).splits["train"].cost
    data.setup("fit")
    packed, useful = computed(data, "packed", ranks, micro)
    padded, _ = computed(data, "padded", ranks, micro)
    assert (cost.useful, cost.packed, cost.padded) == (useful, sum(packed), sum(padded))
    assert (cost.largest_packed, cost.largest_padded) == (max(packed), max(padded))
    assert (cost.parts, cost.steps) == (ranks * micro, len(packed) // (ranks * micro))
    repeated = sum(
        (len(e.branches) - 1) * len(e.prefix_ids) for e in map(data.datasets["train"].__getitem__, range(23))
    )
    assert cost.repeated == repeated and (repeated > 0) == (module is PreferenceDataModule)


def test_pairs_tell_lengths_of_prompt_and_answers_and_what_shared_prompts_save(make, write, tokenizer):
    records = [pair("long question " * 9, "yes", "no"), pair("q", "a longer answer", "no")]
    report = make(PreferenceDataModule, train=write("a.jsonl", *records), max_length=40).check()
    assert report.reasons == {"overlong": 1}
    spreads = report.splits["train"].spreads
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": record["question"]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for record in records
    ]
    prompts = sorted(map(len, asked))
    assert [spreads["prompt"].minimum, spreads["prompt"].maximum] == prompts
    ends = {
        name: [len(tokenizer(r[f"response_{name}"])["input_ids"]) + 1 for r in records]
        for name in spreads
        if name in ("chosen", "rejected")
    }
    for name, sizes in ends.items():
        assert [spreads[name].minimum, spreads[name].maximum] == sorted(sizes)
    whole = [len(p) + c + r for p, c, r in zip(asked, ends["chosen"], ends["rejected"], strict=True)]
    assert spreads["pair"].maximum == max(whole)
    kept = len(asked[1])
    assert f"shared by their answers: {kept} tokens" in str(report)


def test_cut_answers_lose_their_end_of_turn_and_are_counted(make, write, tokenizer):
    data = make(SFTDataModule, train=write("a.jsonl", *RECORDS), max_length=60, overlong="truncate")
    ends = data.check().splits["train"].ends
    data.setup("fit")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = data.datasets["train"]
    trained = [b.input_ids[b.weights > 0] for b in (examples[i].branches[0] for i in range(len(examples)))]
    assert ends == (sum(end in ids.tolist() for ids in trained), 40) and 0 < ends[0] < 40


def test_repeated_examples_and_shared_prompts_are_warned_of(make, write):
    train = write("a.jsonl", talk("a"), talk("b"), talk("a", "no"), {**talk("a"), "id": 9})
    report = make(SFTDataModule, train=train, validation=write("b.jsonl", talk("b"), talk("c"))).check()
    assert report.ok
    text = str(report)
    repeated = "warning: 1 examples of the train data repeat an earlier one, token for token:"
    assert f"{repeated}\n  {train}:4 repeats {train}:1\n" in text
    assert "warning: 1 prompts of the validation data stand in the training data too" in text


def test_the_template_is_told_and_its_warnings_are_there_for_every_kind_of_data(make, write, make_tokenizer):
    path = write("a.jsonl", pair("a"))
    report = make(PreferenceDataModule, train=path, tokenizer=make_tokenizer("none")).check()
    assert report.template[0].startswith("ChatML, for the tokenizer has none") and "<|im_end|>" in report.template[0]
    assert any("no chat template" in text for text in report.warnings)
    report = make(PreferenceDataModule, train=path, tokenizer=make_tokenizer("not_prefix_preserving")).check()
    assert report.template[1].startswith("not prefix-preserving: ") and report.reasons == {"chat template": 1}


def test_a_share_that_cannot_be_held_out_is_a_problem(make, write):
    report = make(SFTDataModule, train=write("a.jsonl", talk("a"), talk("a", "no")), validation=0.5).check()
    assert not report.ok and "problem: validation: cannot split off a fraction of 0.5" in str(report)


def test_without_a_usable_record_it_still_reports(make, write):
    report = make(SFTDataModule, train=write("a.jsonl", talk("")), validation=0.5).check()
    assert report.reasons == {"empty field": 1} and report.splits["train"].report.records == 1
    assert "problem: the train data holds no record that can be used" in str(report)


def test_without_any_source_it_says_what_to_give(make):
    with pytest.raises(ValueError, match=r"SFTDataModule: no data; give data\.train"):
        make(SFTDataModule).check()


def test_text_is_told_in_documents_and_blocks(make, write):
    path = write("a.jsonl", *[{"text": "word " * (30 + i)} for i in range(5)])
    data = make(PretrainDataModule, train=path, block_size=16)
    report = data.check()
    split = report.splits["train"]
    assert report.ok and split.max_length is None and split.ends is None
    assert split.spreads["block"].maximum == 16 and split.spreads["document"].minimum > 30
    assert split.cost.useful == split.cost.packed == split.report.tokens


def test_streamed_data_is_read_as_a_whole_and_it_says_so(make, write):
    path = write("a.jsonl", *RECORDS, talk(""))
    streamed, whole = (make(SFTDataModule, train=path, max_length=2000, streaming=s).check() for s in (True, False))
    assert streamed.reasons == {"empty field": 1}
    assert streamed.splits == whole.splits
    assert "the training data is streamed: a run plans it in windows" in streamed.warnings[-1]


def test_an_epoch_of_weighted_sources_costs_what_its_visits_cost(make, write):
    one, two = write("a.jsonl", *[talk(f"q{i}") for i in range(4)]), write("b.jsonl", talk("long " * 20))
    spec = [{"path": one, "weight": 0.5}, {"path": two, "weight": 3}]
    report = make(SFTDataModule, train=spec).check()
    data = make(SFTDataModule, train=spec)
    data.setup("fit")
    lengths = data.datasets["train"].lengths
    cost = report.splits["train"].cost
    assert data.report.splits["train"].note in str(report)
    assert report.ok and cost.useful == 2 * lengths[0] + 3 * lengths[4] and cost.examples == 5


def test_prompts_are_not_laid_out(make, write):
    path = write("a.jsonl", *[{"question": f"q{i}"} for i in range(7)])
    split = make(PromptDataModule, train=path, batch_size=3).check(micro_batches=4).splits["train"]
    assert (split.cost, split.steps, split.ends) == (None, 3, None)
    assert "3 batches of prompts" in str(make(PromptDataModule, train=path, batch_size=3).check())


def test_worker_processes_find_the_same(make, write):
    path = write("a.jsonl", *RECORDS, talk(""))
    one, two = (make(SFTDataModule, train=path, max_length=100, num_proc=n).check() for n in (None, 2))
    assert str(one) == str(two)


def test_what_a_terminal_would_obey_is_shown_as_an_escape(make, write):
    path = write("a.jsonl", json.dumps({"\x1b[31mred": 1}) + "\n")
    text = str(make(SFTDataModule, train=path).check())
    assert "\x1b" not in text and "\\x1b[31mred" in text


@pytest.mark.real_data
@pytest.mark.parametrize(
    "module, name, reasons",
    [
        (PretrainDataModule, "pretrain/fever.txt", {}),
        (SFTDataModule, "sft/medical_sft.jsonl", {}),
        (SFTDataModule, "sft/toolcall_zh.jsonl", {}),
        (SFTDataModule, "sft/sharegpt_zh.jsonl", {"empty field": 1, "roles out of order": 1}),
        (PreferenceDataModule, "preference/dpo_zh.jsonl", {}),
        (PreferenceDataModule, "preference/dpo_zh_conversations.jsonl", {}),
        (PromptDataModule, "prompts/medical_qa.jsonl", {}),
    ],
)
def test_the_faults_of_real_records_are_found(shared_data, make, module, name, reasons):
    options = {} if module is PretrainDataModule else {"overlong": "drop", "max_length": 4096}
    report = make(module, train=str(shared_data / name), **options).check()
    assert report.reasons == reasons
    lines = (shared_data / name).read_text(encoding="utf-8").splitlines()
    for _, fault in report.faults:
        record = json.loads(lines[int(fault.origin.rpartition(":")[2]) - 1])
        values = [turn["value"].strip() for turn in record["conversations"]]
        assert "" in values or record["conversations"][-1]["from"] == "human"
