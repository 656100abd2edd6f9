"""Sources with weights: how often an epoch sees their examples, exactly and again after a resumption."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from datamodules.formats import resolve
from datamodules.mixtures import mixture_note


@pytest.fixture
def files(write):
    """10 records of a, 8 of b, 5 of c, in the form that every data module but that of pre-training reads."""
    sizes = {"a": 10, "b": 8, "c": 5}
    return {
        name: write(
            f"{name}.jsonl",
            *[
                {
                    "text": f"{name} {i}\n",
                    "question": f"{name}{i}?",
                    "answer": f"{name}{i}.",
                    "chosen": "y",
                    "rejected": "n",
                }
                for i in range(size)
            ],
        )
        for name, size in sizes.items()
    }


@pytest.fixture
def mixture(files):
    return [{"path": files["a"], "weight": 2.0}, {"path": files["b"], "weight": 0.5}, files["c"]]


def start(kind, train, tokenizer, **options):
    data = kind(train=train, tokenizer=tokenizer, **({"batch_size": 4} | options))
    data.setup("fit")
    return data


def seen(data, loader=None):
    """How often one pass gives each example, by the file and line that it comes from."""
    batches = data.train_dataloader() if loader is None else loader
    numbers = [i for batch in batches for i in batch.indices.tolist()]
    return Counter(data.datasets["train"].origin(i).rpartition("/")[2] for i in numbers)


def by_file(counts):
    result = {"a": [], "b": [], "c": []}
    for origin, count in counts.items():
        result[origin[0]].append(count)
    return {name: sorted(values) for name, values in result.items()}


EXPECTED = {"a": [2] * 10, "b": [1] * 4, "c": [1] * 5}


@pytest.mark.parametrize("kind", [SFTDataModule, PreferenceDataModule, PromptDataModule])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=["", "workers"])
def test_an_epoch_sees_the_examples_of_each_source_as_often_as_its_weight_says(mixture, tokenizer, kind, options):
    data = start(kind, mixture, tokenizer, **options)
    loader = data.train_dataloader()
    epochs = [seen(data, loader) for _ in range(3)]
    assert [by_file(epoch) for epoch in epochs] == [EXPECTED] * 3
    halves = {frozenset(origin for origin in epoch if origin.startswith("b.")) for epoch in epochs}
    assert len(halves) > 1  # another half in every epoch
    assert "23 examples, " in str(data.report) and "an epoch sees 29 by the weights" in str(data.report)


def test_a_weight_of_one_and_a_half_is_all_and_a_half_once_more(files, tokenizer):
    data = start(SFTDataModule, {"path": files["a"], "weight": 1.5}, tokenizer)
    assert sorted(seen(data).values()) == [1] * 5 + [2] * 5


def test_a_mixture_goes_on_exactly_after_a_resumption(mixture, tokenizer):
    def batches(loader):
        return [batch.indices.tolist() for batch in loader]

    whole = start(SFTDataModule, mixture, tokenizer).train_dataloader()
    want = batches(whole) + batches(whole)
    stopped = start(SFTDataModule, mixture, tokenizer)
    loader = stopped.train_dataloader()
    got = batches(itertools.islice(loader, 5))
    resumed = start(SFTDataModule, mixture, tokenizer)
    resumed.load_state_dict(stopped.state_dict())
    loader = resumed.train_dataloader()
    assert got + batches(loader) + batches(loader) == want


def test_other_weights_are_another_plan_of_the_same_rows(mixture, files, tokenizer, tmp_path):
    first = start(SFTDataModule, mixture, tokenizer)
    again = start(SFTDataModule, [files["a"], files["b"], files["c"]], tokenizer)
    assert "nothing tokenised" in str(again.report)
    assert first.identity() != again.identity()
    with pytest.raises(ValueError, match=r"data.weights: the run began with \[2.0, 0.5, 1.0\], now it is null"):
        again.load_state_dict(first.state_dict())
    once = start(SFTDataModule, [{"path": files["a"], "weight": 1}, files["b"], files["c"]], tokenizer)
    assert once.identity() == again.identity()


def test_held_out_examples_are_each_seen_once(mixture, tokenizer):
    data = start(SFTDataModule, mixture, tokenizer, validation=0.3)
    validation = [i for batch in data.val_dataloader() for i in batch.indices.tolist()]
    assert sorted(validation) == list(range(len(data.datasets["validation"])))
    origins = {data.datasets["validation"].origin(i).rpartition("/")[2] for i in validation}
    assert origins.isdisjoint(seen(data)) and len(origins) == 7
    assert set(by_file(seen(data))["a"]) == {2}


@pytest.mark.parametrize("split", ["validation", "test", "predict"])
def test_weights_belong_to_training_data_alone(mixture, files, tokenizer, split):
    data = SFTDataModule(train=files["a"], tokenizer=tokenizer, **{split: mixture})
    with pytest.raises(ValueError, match=rf"data\.{split}: a weight says how often training sees a source"):
        data.setup()


def test_the_same_file_may_stand_twice_with_weights_of_its_own(files, tokenizer):
    train = [{"path": files["a"], "weight": 2}, {"path": files["a"], "weight": 1}]
    assert set(seen(start(SFTDataModule, train, tokenizer)).values()) == {3}


def test_a_folder_or_a_glob_has_one_weight_for_all_its_files(files, tokenizer, tmp_path):
    sources = resolve({"path": f"{tmp_path}/[ab].jsonl", "weight": 3})
    assert [source.weight for source in sources] == [3.0, 3.0]
    assert resolve({"path": "org/name", "weight": 2})[0].weight == 2


@pytest.mark.parametrize("weight", [0, -1, 0.0, float("nan"), float("inf"), 1001, True, "2", [1]])
def test_what_is_no_weight_is_refused(files, weight):
    with pytest.raises(ValueError, match=r"a\.jsonl': weight: expected a number above 0 and at most 1000"):
        resolve([{"path": files["a"], "weight": weight}])


def test_a_weight_that_leaves_nothing_of_a_source_is_refused(files, tokenizer):
    train = [files["a"], {"path": files["c"], "weight": 0.05}]
    with pytest.raises(ValueError, match=r"of the 5 examples with weight 0\.05 no epoch would see any"):
        start(SFTDataModule, train, tokenizer)


@given(st.lists(st.sampled_from([0.5, 1.0, 1.25, 2.0]), min_size=8, max_size=60))
def test_the_report_counts_what_the_plan_does(weights):
    from lit_align.batch import epoch_order

    copies = np.array(weights + [0.5] * 4)
    planned = len(epoch_order(len(copies), shuffle=True, seed=0, epoch=3, copies=copies))
    assert mixture_note(copies) == f"an epoch sees {planned} by the weights of their sources"


def test_blocks_of_text_do_not_mix_sources_of_different_weights(files, mixture, tokenizer):
    data = start(PretrainDataModule, mixture, tokenizer, block_size=8)
    examples, corpus = data.datasets["train"], {}
    for name, file in files.items():
        alone = start(PretrainDataModule, file, tokenizer, block_size=8).datasets["train"]
        corpus[name] = [alone[i].branches[0].input_ids.tolist() for i in range(len(alone))]
    weights = {"a": 2.0, "b": 0.5, "c": 1.0}
    for name, blocks in corpus.items():
        mine = [i for i in range(len(examples)) if examples.copies[i] == weights[name]]
        assert [examples[i].branches[0].input_ids.tolist() for i in mine] == blocks
    counts = Counter(i for batch in data.train_dataloader() for i in batch.indices.tolist())
    per_weight = {w: sum(counts[i] for i in range(len(examples)) if examples.copies[i] == w) for w in weights.values()}
    assert per_weight == {2.0: 2 * len(corpus["a"]), 1.0: len(corpus["c"]), 0.5: round(len(corpus["b"]) / 2)}


def test_the_last_blocks_of_a_single_document_are_held_out_with_a_weight_too(write, tokenizer):
    train = {"path": write("a.txt", "one two three four five six seven eight nine ten " * 10), "weight": 2}
    data = start(PretrainDataModule, train, tokenizer, block_size=16, validation=0.25)
    kept, held_out = data.datasets["train"], data.datasets["validation"]
    assert set(kept.copies) == {2.0} and len(kept.copies) == len(kept) > len(held_out) > 0
    assert {len(list(group)) for _, group in itertools.groupby(sorted(
        i for batch in data.train_dataloader() for i in batch.indices.tolist()))} == {2}  # fmt: skip
