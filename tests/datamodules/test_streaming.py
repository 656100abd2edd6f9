"""Streamed training data: the examples of stored data, in steps that go on exactly wherever a run was stopped."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule, store, stream
from datamodules.formats import DataError
from datamodules.report import SplitReport
from lit_align.models.source import ModelSource
from lit_align.stages import LitSFT


def record(i, name="a"):
    return {
        "question": f"{name}{i}" + "?" * (i % 5 + 1),
        "answer": f"{name}{i}.",
        "chosen": f"y{i}",
        "rejected": "n",
        "text": f"{name} {i}\n" * (i % 3 + 1),
    }


@pytest.fixture
def files(write):
    """23 records in two files."""
    return [write("a.jsonl", *[record(i) for i in range(13)]), write("b.jsonl", *[record(i, "b") for i in range(10)])]


def start(kind, train, tokenizer, **options):
    options = {"streaming": True, "stream_window": 7, "batch_size": 3} | options
    data = kind(train=train, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def ids(example):
    return tuple(example.prefix_ids.tolist()), *(tuple(branch.input_ids.tolist()) for branch in example.branches)


def contents(batch):
    """The sequences of a packed micro-batch."""
    return [tuple(batch.input_ids[0, s.start : s.stop].tolist()) for s in batch.segments] * (batch.num_examples > 0)


def stored(kind, train, tokenizer, **options):
    """The same data, tokenised as a whole."""
    data = start(kind, train, tokenizer, streaming=False, **options)
    return [data.datasets["train"][i] for i in range(len(data.datasets["train"]))]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "size", [{"batch_size": 3}, {"batch_size": None, "max_tokens": 60}], ids=["examples", "tokens"]
)
@pytest.mark.parametrize("kind", [SFTDataModule, PreferenceDataModule])
def test_an_epoch_of_the_stream_holds_every_example_once(files, tokenizer, kind, size, workers):
    want = Counter(part for example in stored(kind, files, tokenizer) for part in ids(example) if part)
    loader = start(kind, files, tokenizer, num_workers=workers, **size).train_dataloader()
    epochs = [[], []]
    for batch in itertools.islice(loader, 60):
        epoch = loader.cursor["epoch"] if loader.cursor["window"] or loader.cursor["step"] else None
        if epoch == 2:
            break
        epochs[epoch].append(contents(batch))
    assert [Counter(part for batch in epoch for part in batch) for epoch in epochs] == [want, want]
    assert epochs[0] != epochs[1]


def test_nothing_of_a_stream_is_kept_and_no_window_is_read_before_it_is_needed(files, tokenizer, tmp_path, monkeypatch):
    seen = []
    tokenise = store.Guard.__call__
    monkeypatch.setattr(store.Guard, "__call__", lambda self, row: seen.append(row["origin"]) or tokenise(self, row))
    monkeypatch.setattr(store, "tokenise", lambda *_: pytest.fail("stored"))
    data = start(SFTDataModule, files, tokenizer)
    batches = iter(data.train_dataloader())
    assert not seen and not (tmp_path / "cache").exists()
    for _ in range(4):  # a window of 7 is 3 steps: 3, 3 and 1
        next(batches)
    assert len(seen) == 14


def test_order_is_a_function_of_seed_epoch_and_window(files, tokenizer):
    def order(**options):
        loader = start(SFTDataModule, files[0], tokenizer, batch_size=7, **options).train_dataloader()
        return [contents(batch) for batch in itertools.islice(loader, 4)]

    assert order(seed=1) == order(seed=1) != order(seed=2)
    first = order()
    assert sorted(first[0]) == sorted(first[2]) and first[0] != first[2]
    number = {ids(example)[1]: i for i, example in enumerate(stored(SFTDataModule, files[0], tokenizer))}
    one, two = (
        [number[part] % 6 for part in contents(batch)]
        for batch in itertools.islice(
            start(SFTDataModule, files[0], tokenizer, stream_window=6, batch_size=6).train_dataloader(), 2
        )
    )
    assert sorted(one) == sorted(two) and one != two


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 8, 9, 12])
def test_going_on_from_a_cursor_tokenises_nothing_that_was_seen(files, tokenizer, monkeypatch, stop, workers):
    whole = [contents(b) for b in itertools.islice(start(SFTDataModule, files, tokenizer).train_dataloader(), 20)]
    stopped = start(SFTDataModule, files, tokenizer, num_workers=workers)
    loader = stopped.train_dataloader()
    assert [contents(b) for b in itertools.islice(loader, stop)] == whole[:stop]
    state = stopped.state_dict()
    seen, tokenise = [], store.Guard.__call__
    monkeypatch.setattr(store.Guard, "__call__", lambda self, row: seen.append(row["origin"]) or tokenise(self, row))
    resumed = start(SFTDataModule, files, tokenizer)
    resumed.load_state_dict(state)
    assert [contents(b) for b in itertools.islice(resumed.train_dataloader(), 20 - stop)] == whole[stop:]
    if 3 <= stop < 9:  # after the first window
        assert not any(origin.endswith(("a.jsonl:1", "a.jsonl:7")) for origin in seen[:7])


def test_ranks_and_micro_batches_share_the_steps_of_the_stream(files, tokenizer):
    def steps(world_size, micro_batches):
        loaders = []
        for rank in range(world_size):
            loader = start(SFTDataModule, files, tokenizer).train_dataloader()
            loader.stream.rank, loader.stream.world_size = rank, world_size
            loader.stream.micro_batches = micro_batches
            loaders.append(list(itertools.islice(loader, 12 * micro_batches)))
        return [
            sorted(part for batches in loaders for b in batches[at : at + micro_batches] for part in contents(b))
            for at in range(0, 12 * micro_batches, micro_batches)
        ]

    assert steps(1, 1) == steps(2, 1) == steps(3, 2)


def test_a_step_that_was_only_begun_is_handed_out_again(files, tokenizer):
    data = start(SFTDataModule, files, tokenizer)
    loader = data.train_dataloader()
    loader.stream.micro_batches = 2
    batches = iter(loader)
    next(batches)
    assert data.state_dict()["cursor"] == stream.START
    next(batches)
    assert data.state_dict()["cursor"] == {**stream.START, "step": 1}


@pytest.mark.parametrize("window", [2, 5, 100])
def test_blocks_are_cut_inside_a_window_and_no_token_of_the_text_is_lost(write, tokenizer, window, monkeypatch):
    from datamodules.formats import readers

    monkeypatch.setattr(readers, "PIECE", 10)
    text = "".join(f"line {i} of the text\n" for i in range(40))
    path = write("a.txt", text)
    data = start(PretrainDataModule, path, tokenizer, block_size=16, batch_size=1, stream_window=window)
    source = data.train_dataloader().stream
    read = ""
    for part in source._windows(0, 0):
        examples = source._tokenised(part, SplitReport())
        piece = "".join(json.loads(raw.text)["text"] for raw in part.raw)
        want = tokenizer(piece)["input_ids"]
        got = [token for i in range(len(examples)) for token in examples[i].branches[0].input_ids.tolist()]
        assert got == (want[:-1] if len(want) % 16 == 1 else want)
        read += piece
    assert read == text


BAD = '{"question": ""}\n'


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_stop_the_run_with_file_and_line(files, write, tokenizer, workers):
    bad = write("c.jsonl", BAD)
    loader = start(SFTDataModule, [*files, bad], tokenizer, num_workers=workers).train_dataloader()
    with pytest.raises(DataError, match=r"c\.jsonl:1: question: found an empty text"):
        list(itertools.islice(loader, 10))


@pytest.mark.parametrize("window", [7, 30])
@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_and_dropped_records_are_counted_as_they_are_read(files, write, tokenizer, workers, window):
    bad = write("c.jsonl", BAD + "{\n" + json.dumps({"question": "q", "answer": "b " * 300}) + "\n")
    broken = write("d.jsonl", b"\xff\n")
    options = {"on_error": "skip", "overlong": "drop", "max_length": 100, "num_workers": workers}
    options["stream_window"] = window
    data = start(SFTDataModule, [files[0], bad, broken, files[1]], tokenizer, **options)
    assert f"streamed in windows of {window} records" in str(data.report)
    loader, report = data.train_dataloader(), data.report.splits["train"]
    found = Counter()
    for batch in loader:
        found.update(contents(batch))
        if loader.cursor["record"] == 26:
            break
    assert (report.records, report.examples) == (27, 23)
    assert report.skipped == {"empty field": 1, "invalid JSON": 1, "encoding": 1} and report.dropped == {"overlong": 1}
    whole = start(SFTDataModule, [files[0], bad, broken, files[1]], tokenizer, streaming=False, **options)
    want = whole.report.splits["train"]
    assert (report.tokens, report.trained, sorted(report.faults)) == (want.tokens, want.trained, sorted(want.faults))
    assert found == Counter(part for example in whole.datasets["train"] for part in ids(example) if part)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.timeout(60)
def test_a_stream_without_a_usable_record_ends(write, tokenizer, workers):
    data = start(SFTDataModule, write("a.jsonl", BAD * 20), tokenizer, on_error="skip", num_workers=workers)
    with pytest.raises(ValueError, match=r"no record of .*a\.jsonl can be used: .*20 \(empty field\) of 20 records"):
        next(iter(data.train_dataloader()))


def test_another_stream_is_not_gone_on_with(files, write, tokenizer):
    first = start(SFTDataModule, files, tokenizer)
    with pytest.raises(ValueError, match=r"data\.stream_window: the run began with 7, now it is 8"):
        start(SFTDataModule, files, tokenizer, stream_window=8).load_state_dict(first.state_dict())
    write("b.jsonl", *[record(i, "c") for i in range(10)])
    with pytest.raises(ValueError, match="the contents of the files"):
        start(SFTDataModule, files, tokenizer).load_state_dict(first.state_dict())


def test_a_dataset_id_is_streamed(tmp_path, tokenizer, write):
    path = write("a.csv", "question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(5)))
    source = {"path": "csv", "data_files": path, "split": "train"}
    loader = start(SFTDataModule, source, tokenizer, stream_window=5).train_dataloader()
    found = [part for batch in itertools.islice(loader, 2) for part in contents(batch)]
    assert sorted(found) == sorted(part for e in stored(SFTDataModule, source, tokenizer) for part in ids(e) if part)


def test_what_a_stream_cannot_do_is_told(files, tokenizer):
    with pytest.raises(ValueError, match=r"validation = 0\.1: nothing can be split off a stream"):
        SFTDataModule(train=files, streaming=True, validation=0.1)
    with pytest.raises(ValueError, match="stream_window: expected at least 1"):
        SFTDataModule(train=files, stream_window=0)
    with pytest.raises(ValueError, match="leave the weights"):
        start(SFTDataModule, {"path": files[0], "weight": 2}, tokenizer)
    with pytest.raises(ValueError, match="prompts for rollouts are not streamed"):
        start(PromptDataModule, files, tokenizer)
    with pytest.raises(ValueError, match=r"give trainer\.max_steps"):
        fit(LitSFT, start(SFTDataModule, files, tokenizer), max_epochs=1)


def test_a_step_that_the_trainer_did_not_get_through_is_handed_out_again(files, tokenizer):
    """At each step of two epochs: windows and epochs end in between."""
    whole = [contents(b) for b in itertools.islice(start(SFTDataModule, files, tokenizer).train_dataloader(), 20)]
    data = start(SFTDataModule, files, tokenizer)
    loader = data.train_dataloader()
    for step, _ in enumerate(itertools.islice(loader, 19)):
        loader.unfinished = lambda: True
        resumed = start(SFTDataModule, files, tokenizer)
        resumed.load_state_dict(data.state_dict())
        loader.unfinished = bool
        assert [contents(b) for b in itertools.islice(resumed.train_dataloader(), 2)] == whole[step : step + 2]


# --- through a real trainer ------------------------------------------------------------------------------------------


class Seen(lightning.LightningModule):
    """Keeps what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight, self.batches, self.validated = torch.nn.Parameter(torch.zeros(())), [], 0

    def training_step(self, batch):
        self.batches.append(contents(batch))
        return self.weight * 0

    def validation_step(self, batch):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model, data, checkpoint=None, **options):
    model = model if isinstance(model, lightning.LightningModule) else Seen()
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    options.setdefault("enable_checkpointing", "callbacks" in options)
    lightning.Trainer(**settings | options).fit(model, data, ckpt_path=checkpoint)
    return model


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_sees_exactly_the_remaining_examples(files, tokenizer, tmp_path, workers, micro_batches):
    options = {"max_steps": 14, "accumulate_grad_batches": micro_batches}

    def data():
        return start(SFTDataModule, files, tokenizer, num_workers=workers)

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(Seen(), data(), callbacks=[keep], **options)
    assert len(whole.batches) == 14 * micro_batches
    for step in (1, 3, 8, 9, 13):
        resumed = fit(Seen(), data(), checkpoint=tmp_path / f"step={step}.ckpt", **options)
        assert resumed.batches == whole.batches[step * micro_batches :]


def test_a_longer_run_goes_on_where_a_finished_one_ended(files, tokenizer, tmp_path):
    whole = fit(Seen(), start(SFTDataModule, files, tokenizer), max_steps=14)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = fit(Seen(), start(SFTDataModule, files, tokenizer), max_steps=5, callbacks=[keep])
    rest = fit(Seen(), start(SFTDataModule, files, tokenizer), max_steps=14, checkpoint=tmp_path / "step=5.ckpt")
    assert first.batches + rest.batches == whole.batches


def test_validation_data_stands_beside_a_stream(files, tokenizer):
    data = start(SFTDataModule, files[0], tokenizer, validation=files[1])
    model = fit(Seen(), data, max_steps=4, val_check_interval=2)
    assert len(model.batches) == 4 and model.validated == 2 * 4


def test_a_stage_that_is_resumed_on_a_stream_ends_with_the_same_weights(tiny_model, files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def stage():
        torch.manual_seed(0)
        return LitSFT(ModelSource(path=str(tiny_model)))

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(stage(), start(SFTDataModule, files, tokenizer, num_workers=1), max_steps=10, callbacks=[keep])
    resumed = fit(stage(), start(SFTDataModule, files, tokenizer), max_steps=10, checkpoint=tmp_path / "step=4.ckpt")
    early = fit(stage(), start(SFTDataModule, files, tokenizer), max_steps=4).state_dict()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert any(not torch.equal(value, early[name]) for name, value in resumed.state_dict().items())
