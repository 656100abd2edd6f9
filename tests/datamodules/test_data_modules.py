"""What all data modules promise: examples, plans, held-out data, and a cursor that can be put back."""

from __future__ import annotations

import pickle
from itertools import chain

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from lit_align.batch import MicroBatch

MODULES = {
    PretrainDataModule: lambda i: {"text": f"Document {i}: " + "word " * (5 + i)},
    SFTDataModule: lambda i: {
        "conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a " * (1 + i % 7)}]
    },
    PreferenceDataModule: lambda i: {"question": f"q{i}", "chosen": "a " * (1 + i % 5), "rejected": "b " * (1 + i % 3)},
    PromptDataModule: lambda i: {"question": f"q{i} " * (1 + i % 4), "answer": i},
}
every_module = pytest.mark.parametrize("module", MODULES)


@pytest.fixture
def make(write, tokenizer):
    def make(module, count=20, stage="fit", **options):
        if module is PretrainDataModule:
            options.setdefault("block_size", 16)
        options.setdefault("train", write("train.jsonl", *[MODULES[module](i) for i in range(count)]))
        data = module(tokenizer=options.pop("tokenizer", tokenizer), **options)
        data.prepare_data()
        data.setup(stage)
        return data

    return make


def contents(batch):
    """Everything in a batch, to compare by."""
    if isinstance(batch, MicroBatch):
        return [batch.input_ids.tolist(), batch.indices.tolist(), batch.scored.targets.tolist(), batch.totals]
    return [[ids.tolist() for ids in batch.prompt_ids], batch.records, batch.indices.tolist()]


@every_module
def test_lengths_and_weights_are_those_of_the_examples(make, module):
    examples = make(module).datasets["train"]
    assert len(examples) == len(examples.lengths) == len(examples.trained_weights)
    for index in range(len(examples)):
        if module is PromptDataModule:
            assert examples.lengths[index] == len(examples[index][0])
        else:
            assert examples.lengths[index] == len(examples[index])
            assert examples.trained_weights[index] == pytest.approx(examples[index].trained_weight, abs=1e-6)


@every_module
def test_an_epoch_hands_out_every_example_once(make, module):
    data = make(module, batch_size=3)
    seen = sorted(index for batch in data.train_dataloader() for index in batch.indices.tolist())
    assert seen == list(range(len(data.datasets["train"])))


@every_module
def test_ids_are_int64_and_weights_float32(make, module):
    example = make(module).datasets["train"][0]
    if module is PromptDataModule:
        assert example[0].dtype == torch.int64 and isinstance(example[1], dict)
    else:
        assert example.prefix_ids.dtype == example.branches[0].input_ids.dtype == torch.int64
        assert example.branches[0].weights.dtype == torch.float32


@every_module
def test_the_cursor_goes_on_where_it_was_with_or_without_workers(make, module):
    whole = [
        contents(batch) for loader in [make(module, batch_size=4).train_dataloader()] for _ in "ab" for batch in loader
    ]
    first = make(module, batch_size=4)
    loader = iter(first.train_dataloader())
    begun = [contents(next(loader)) for _ in range(3)]
    state = first.state_dict()
    assert state["cursor"] == {"epoch": 0, "step": 3}
    rest = make(module, batch_size=4, num_workers=1)
    rest.load_state_dict(state)
    loader = rest.train_dataloader()
    assert begun + [contents(batch) for _ in "ab" for batch in loader] == whole


@every_module
def test_a_cursor_that_comes_late_reaches_the_loader(make, module):
    data = make(module, batch_size=4)
    loader = data.train_dataloader()
    state = {"cursor": {"epoch": 1, "step": 2}, "identity": data.identity()}
    data.load_state_dict(state)
    again = make(module, batch_size=4)
    again.load_state_dict(state)
    assert [contents(b) for b in loader] == [contents(b) for b in again.train_dataloader()]


@every_module
def test_a_fraction_is_held_out_by_prompt_and_validated_in_order(make, module):
    data = make(module, count=30, validation=0.2, eval_batch_size=4)
    train, held_out = data.datasets["train"], data.datasets["validation"]
    keys = train.rows.numbers("key")
    assert not set(keys[train.chosen]) & set(keys[held_out.chosen])
    assert len(set(keys[held_out.chosen])) == 6
    if module is not PretrainDataModule:
        whole = make(module, count=30).datasets["train"]
        for part in (train, held_out):
            assert [str(part[i]) for i in range(len(part))] == [str(whole[row]) for row in part.chosen]
            assert [*part.lengths] == [whole.lengths[row] for row in part.chosen]
            assert [*part.trained_weights] == [whole.trained_weights[row] for row in part.chosen]
    order = [index for batch in data.val_dataloader() for index in batch.indices.tolist()]
    assert order == sorted(order) and len(order) == len(held_out)
    assert "0.2 of the" in data.report.splits["validation"].note
    assert [*make(module, count=30, validation=0.2, stage="validate").datasets["validation"].chosen] == [
        *held_out.chosen
    ]


@every_module
def test_validation_test_and_predict_have_files_of_their_own(make, module, write):
    path = write("other.jsonl", *[MODULES[module](i) for i in range(100, 103)])
    data = make(module, stage=None, validation=path, test=path, predict=path)
    for split, loader in (("test", data.test_dataloader()), ("predict", data.predict_dataloader())):
        assert sum(len(batch.indices) for batch in loader) == len(data.datasets[split])
    assert make(module, stage="test", test=path).datasets.keys() == {"test"}
    assert [*make(module).val_dataloader()] == []


@every_module
def test_prompts_in_both_training_and_validation_data_are_warned_of(make, module, write):
    path = write("other.jsonl", *[MODULES[module](i) for i in range(18, 23)])
    assert make(module, validation=path).report.warnings == [
        "2 prompts of the validation data stand in the training data too"
    ]


@every_module
def test_a_missing_source_or_tokenizer_is_told(make, module, write):
    with pytest.raises(ValueError, match=rf"{module.__name__}: no training data; give data\.train"):
        make(module, train=None)
    with pytest.raises(ValueError, match=rf"{module.__name__}: no test data; give data\.test"):
        make(module).test_dataloader()
    with pytest.raises(ValueError, match=rf"{module.__name__}: no tokenizer; give data\.tokenizer"):
        make(module, tokenizer=None)
    with pytest.raises(ValueError, match=r"it cannot be loaded \(no such folder; it was tried"):
        make(module, tokenizer="no/such/folder")


@every_module
def test_a_tokenizer_is_loaded_from_its_folder(make, module, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = make(module, tokenizer=str(tmp_path / "tokenizer"))
    assert data.identity() == make(module).identity()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_error": "ignore"}, "on_error: expected one of raise, skip, got 'ignore'"),
        ({"overlong": "cut"}, "overlong: expected one of raise, drop, truncate"),
        ({"layout": "flat"}, "layout: expected one of packed, padded"),
        ({"padding_side": "top"}, "padding_side: expected one of left, right"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_length": 1}, "max_length: expected at least 2, got 1"),
        ({"validation": 1.5}, "a fraction between 0 and 1, got 1.5"),
        ({"train_on": "first"}, "train_on: expected 'all' or 'last'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SFTDataModule(**options)


@pytest.mark.parametrize("module", [PretrainDataModule, SFTDataModule, PreferenceDataModule])
def test_packed_and_padded_batches_score_the_same_tokens(make, module):
    for side in ("left", "right"):
        packed = make(module, layout="packed").train_dataloader()
        padded = make(module, layout="padded", padding_side=side).train_dataloader()
        for a, b in zip(packed, padded, strict=True):
            assert a.attention_mask is None and b.segments is None
            assert torch.equal(a.scored.targets, b.scored.targets) and a.totals == b.totals
            assert b.attention_mask[:, 0].all() == (side == "right") or b.attention_mask.all()


@every_module
def test_examples_travel_to_other_processes_without_their_rows(make, module):
    data = make(module, count=5)
    copy = pickle.loads(pickle.dumps(data.datasets["train"]))
    assert str(copy[2]) == str(data.datasets["train"][2])
    assert copy.origin(0).endswith("train.jsonl:1")


class Counter(lightning.LightningModule):
    """Counts what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.steps = [], 0

    def training_step(self, batch):
        self.batches.append(batch.indices.tolist())
        return self.weight * 0

    def on_before_optimizer_step(self, _):
        self.steps += 1

    def validation_step(self, batch):
        assert len(batch.indices) <= 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **options):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


@pytest.mark.parametrize("module", [SFTDataModule, PreferenceDataModule])
def test_batch_size_is_that_of_an_optimizer_step_however_many_micro_batches(make, module, tmp_path):
    data, model = make(module, count=10, validation=0.2, batch_size=4, eval_batch_size=2), Counter()
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, enable_checkpointing=False).fit(model, data)
    assert model.steps == 2 and [len(batch) for batch in model.batches] == [2, 2, 2, 2]
    assert sorted(i for batch in model.batches for i in batch) == list(range(8))


def test_lightning_keeps_the_cursor_in_its_checkpoint_and_puts_it_back(make, tmp_path):
    whole, rest = Counter(), Counter()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"batch_size": 3, "count": 12}
    trainer(tmp_path, max_epochs=2, callbacks=keep).fit(whole, make(SFTDataModule, **options))
    assert len(whole.batches) == 8
    for step in (2, 4, 5):
        path, rest = tmp_path / f"step={step}.ckpt", Counter()
        resumed = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
        resumed.fit(rest, make(SFTDataModule, **options), ckpt_path=path)
        assert rest.batches == whole.batches[step:]
        state = torch.load(path, weights_only=True)["SFTDataModule"]
        assert state["cursor"] == {"epoch": (step - 1) // 4, "step": (step - 1) % 4 + 1}


def test_loaders_that_are_asked_for_anew_go_on_where_the_old_ones_were(make, tmp_path):
    runs = [Counter(), Counter()]
    for model, options in zip(runs, ({}, {"reload_dataloaders_every_n_epochs": 1}), strict=True):
        fit = trainer(tmp_path, max_epochs=3, enable_checkpointing=False, **options)
        fit.fit(model, make(SFTDataModule, count=6, batch_size=2))
    assert runs[0].batches == runs[1].batches and len(runs[0].batches) == 9


def test_validating_with_a_checkpoint_resumes_nothing_and_refuses_nothing(make, tmp_path):
    data, keep = make(SFTDataModule, count=12, validation=0.3, batch_size=2), ModelCheckpoint(tmp_path, filename="one")
    trainer(tmp_path, max_epochs=1, callbacks=keep).fit(Counter(), data)
    other = make(SFTDataModule, count=12, validation=0.3, batch_size=4, eval_batch_size=2)
    trainer(tmp_path, enable_checkpointing=False).validate(Counter(), other, ckpt_path=tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"data\.batch_size: the run began with 2, now it is 4"):
        trainer(tmp_path, max_epochs=2).fit(Counter(), other, ckpt_path=tmp_path / "one.ckpt")


def test_validating_in_between_keeps_the_place_of_the_training_data(make, tmp_path):
    data, model = make(SFTDataModule, count=12, validation=0.3, batch_size=2), Counter()
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    fit.fit(model, data)
    before = data.state_dict()
    fit.validate(model, data)
    assert data.state_dict() == before and before["identity"]


def test_an_example_that_fills_more_than_a_step_is_told(make):
    longest = int(make(SFTDataModule).datasets["train"].lengths.max())
    told = make(SFTDataModule, batch_size=None, max_tokens=longest - 1).report.warnings
    assert any(f"longer than max_tokens = {longest - 1}" in text for text in told)
    assert not any(
        "max_tokens" in text for text in make(SFTDataModule, batch_size=None, max_tokens=longest).report.warnings
    )
    with pytest.raises(ValueError, match="give one, set the other to null"):
        make(SFTDataModule, batch_size=2, max_tokens=10)


def test_a_second_fit_without_checkpoint_begins_anew(make, tmp_path):
    data, runs = make(SFTDataModule, count=6, batch_size=3), [Counter(), Counter()]
    for model in runs:
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(model, data)
    assert runs[0].batches == runs[1].batches and len(runs[0].batches) == 2


@every_module
def test_the_order_follows_the_seed_and_the_epoch(make, module):
    def order(seed):
        loader = make(module, seed=seed, batch_size=5).train_dataloader()
        return [[batch.indices.tolist() for batch in loader] for _ in range(2)]

    assert order(1) == order(1) != order(2)
    first, second = order(1)
    assert first != second and sorted(chain(*first)) == sorted(chain(*second))
