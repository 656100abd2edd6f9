"""Training with cached reference log-probabilities is training with the reference itself, in half the networks."""

import logging
import math
import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_align.batch import Branch, Example
from lit_align.callbacks.random_state import RandomState
from lit_align.losses import IPO, ORPO
from lit_align.models import reference as reference_module
from lit_align.models.reference_cache import write_logps
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.stages import LitDPO
from lit_align.stages.reference_tables import relative_difference

OTHERS = {
    "full": {},
    "lora": {"lora": LoraSettings(r=4, dropout=0.1)},
}


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """The tiny model with other weights: a reference of its own."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("other") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Names of the references that were loaded."""
    names, load = [], reference_module.load_causal_lm

    def noting(source, name="model"):
        names.append(name)
        return load(source, name)

    monkeypatch.setattr(reference_module, "load_causal_lm", noting)
    return names


class Kept(Callback):
    """The reference while the model trains."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(pl_module.reference)


def stage_of(source, cache, **options):
    torch.manual_seed(0)
    options.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4))
    return LitDPO(source, reference_cache=cache, **options)


def fit(stage, data, trainer, checkpoint=None):
    logged = []
    stage.log = lambda name, value, **_: logged.append((name, float(value)))
    torch.manual_seed(1)
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint)
    return logged


def assert_same_run(one, other, logged, other_logged):
    assert [name for name, _ in logged] == [name for name, _ in other_logged]
    assert [v for _, v in other_logged] == pytest.approx([v for _, v in logged], rel=1e-6, abs=1e-6)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def files(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("own", [False, True], ids=["start", "own"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_with_the_cache_is_the_run_without(
    kind, own, tiny_model, other_model, pairs, make_data, make_trainer, tmp_path
):
    source = ModelSource(path=str(tiny_model), **OTHERS[kind])
    options = {"reference": ModelSource(path=str(other_model))} if own else {}
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2, "limit_val_batches": 1.0, "num_sanity_val_steps": 1}
    live, kept = stage_of(source, False, **options), Kept()
    want = fit(live, make_data(pairs), make_trainer(**settings))
    for _ in ("computed", "read"):
        cached = stage_of(source, str(tmp_path / "cache"), **options)
        got = fit(cached, make_data(pairs), make_trainer(**settings, callbacks=[kept]))
        assert_same_run(live, cached, want, got)
        assert cached.fingerprints() == live.fingerprints()
    assert cached.reference is None and set(kept.seen) == {None}
    assert ("reference" in live.fingerprints()) == (own or kind == "full")
    assert len(files(tmp_path / "cache")) == 1, "training and validation hold the same pairs here"


def test_the_table_holds_what_plain_transformers_says(tiny_model, pairs, make_data, make_trainer, tmp_path):
    """Pair by pair and branch by branch, in float64, with logits of everything."""
    fit(stage_of(ModelSource(path=str(tiny_model)), str(tmp_path)), make_data(pairs), make_trainer(max_steps=1))
    (path,) = files(tmp_path)
    table = load_file(path)["logps"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    assert table.shape == (20, 2) and table.dtype == torch.float64
    for pair, row in zip(pairs, table, strict=True):
        for branch, value in zip(pair.branches, row, strict=True):
            ids, start = torch.cat([pair.prefix_ids, branch.input_ids]), len(pair.prefix_ids)
            with torch.no_grad():
                logps = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
            want = sum(float(logps[at - 1, ids[at]]) for at in range(start, len(ids)))
            assert float(value) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
def test_it_begins_at_ln_2(kind, tiny_model, pairs, make_data, make_trainer, tmp_path):
    stage = stage_of(ModelSource(path=str(tiny_model), **OTHERS[kind]), str(tmp_path))
    logged = dict(reversed(fit(stage, make_data(pairs), make_trainer(max_steps=2))))
    assert logged["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_reference_is_never_loaded_where_the_policy_is_still_the_same(
    loads, tiny_model, pairs, make_data, make_trainer, tmp_path
):
    for _ in ("computed", "read"):
        fit(stage_of(ModelSource(path=str(tiny_model)), str(tmp_path)), make_data(pairs), make_trainer(max_steps=1))
    assert loads == []


def test_validation_pairs_are_told_from_training_pairs(tiny_model, pairs, make_data, make_trainer, tmp_path):
    class Split(type(make_data(pairs))):
        def val_dataloader(self):
            held_out = type(self)(pairs[13:], batch_size=3)
            held_out.trainer = self.trainer
            return held_out.predict_dataloader()

    source, settings = ModelSource(path=str(tiny_model)), {"max_epochs": 2, "limit_val_batches": 1.0}
    live, cached = stage_of(source, False), stage_of(source, str(tmp_path))
    want = fit(live, Split(pairs[:13]), make_trainer(**settings))
    assert_same_run(live, cached, want, fit(cached, Split(pairs[:13]), make_trainer(**settings)))
    assert sorted(len(load_file(path)["logps"]) for path in files(tmp_path)) == [7, 13]
    assert {name for name, _ in want} >= {"val/loss", "train/loss"}


def test_the_first_examples_of_an_epoch_may_come_several_times(tiny_model, make_trainer, tmp_path, monkeypatch):
    """A mixture: some pairs twice an epoch, of others another half in each."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "data"))
    for name, count in (("often", 5), ("seldom", 8)):
        lines = [
            f'{{"prompt": "{name} {i}", "chosen": "{"a" * (i % 4 + 1)}", "rejected": "{"b" * (i % 3 + 2)}"}}\n'
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    from datamodules import PreferenceDataModule

    def data():
        train = [{"path": str(tmp_path / "often.jsonl"), "weight": 2}]
        train.append({"path": str(tmp_path / "seldom.jsonl"), "weight": 0.5})
        return PreferenceDataModule(train=train, tokenizer=str(tiny_model), batch_size=4)

    source = ModelSource(path=str(tiny_model))
    live, cached = stage_of(source, False), stage_of(source, True)
    want = fit(live, data(), make_trainer(max_epochs=3))
    assert_same_run(live, cached, want, fit(cached, data(), make_trainer(max_epochs=3)))
    (path,) = files(tmp_path / "data" / "reference")
    assert len(load_file(path)["logps"]) == 13


def changed_pair(pairs, other_model):
    prompt, (chosen, rejected) = pairs[7].prefix_ids.clone(), pairs[7].branches
    prompt[0] ^= 1
    return [*pairs[:7], Example(prompt, (chosen, rejected)), *pairs[8:]], {}


def moved_border(pairs, other_model):
    """The same ids, of which one more belongs to the prompt."""
    at = next(i for i, pair in enumerate(pairs) if all(len(b.input_ids) > 1 for b in pair.branches))
    first = pairs[at].branches[0].input_ids[:1]
    branches = tuple(Branch(b.input_ids[1:], b.weights[1:]) for b in pairs[at].branches)
    return [*pairs[:at], Example(torch.cat([pairs[at].prefix_ids, first]), branches), *pairs[at + 1 :]], {}


CHANGES = {
    "a token": changed_pair,
    "a border": moved_border,
    "order": lambda pairs, other: (pairs[::-1], {}),
    "a pair less": lambda pairs, other: (pairs[:-1], {}),
    "weights": lambda pairs, other: (pairs, {"path": str(other)}),
    "dtype": lambda pairs, other: (pairs, {"dtype": "float64"}),
    "attention": lambda pairs, other: (pairs, {"attention": "sdpa", "layout": "padded"}),
    "precision": lambda pairs, other: (pairs, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_numbers_makes_another_file(
    change, tiny_model, other_model, pairs, make_data, make_trainer, tmp_path
):
    def go(pairs, path=str(tiny_model), layout="packed", precision="32-true", **options):
        stage = stage_of(ModelSource(path=path, **options), str(tmp_path))
        fit(stage, make_data(pairs, layout=layout), make_trainer(max_steps=1, precision=precision))

    go(pairs)
    before = files(tmp_path)
    items, options = CHANGES[change](pairs, other_model)
    go(items, **options)
    assert len(files(tmp_path)) == 2 and set(before) < set(files(tmp_path))
    go(pairs, layout="padded")  # the layout does not change them beyond rounding
    assert len(files(tmp_path)) == 2


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_name(path):
    write_logps(path.with_name("0" * 64 + ".safetensors"), load_file(path)["logps"])
    path.with_name("0" * 64 + ".safetensors").replace(path)


DAMAGES = {
    "cut": damage_cut,
    "bit": damage_bit,
    "name": damage_name,
    "empty": lambda path: path.write_bytes(b""),
    "rows": lambda path: write_logps(path, load_file(path)["logps"][:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_never_used(damage, tiny_model, pairs, make_data, make_trainer, tmp_path):
    def go():
        stage = stage_of(ModelSource(path=str(tiny_model)), str(tmp_path))
        return fit(stage, make_data(pairs), make_trainer(max_steps=2))

    want = go()
    (path,) = files(tmp_path)
    whole = load_file(path)["logps"].clone()
    DAMAGES[damage](path)
    with pytest.warns(UserWarning, match=r"safetensors is damaged and is computed anew"):
        assert go() == want
    assert torch.equal(load_file(path)["logps"], whole)


@pytest.mark.parametrize(
    "wrong",
    [lambda t: t + 0.01, lambda t: t.flip(1), lambda t: t.roll(1, 0), lambda t: t * float("nan")],
    ids=["shifted", "swapped", "rolled", "nan"],
)
def test_a_whole_file_with_other_numbers_is_refused(wrong, tiny_model, pairs, make_data, make_trainer, tmp_path):
    def go():
        fit(stage_of(ModelSource(path=str(tiny_model)), str(tmp_path)), make_data(pairs), make_trainer(max_steps=1))

    go()
    (path,) = files(tmp_path)
    write_logps(path, wrong(load_file(path)["logps"]))
    with pytest.raises(ValueError, match=r"the reference gives .* nats, and .* delete this file"):
        go()


def test_differences_are_relative_to_the_larger_magnitude():
    """Log-probabilities are negative: the larger number is the one nearer to 0."""
    one, other = torch.tensor([-98.0, 3.0, -0.5]), torch.tensor([-100.0, -4.0, -0.25])
    for pair in ((one, other), (other, one)):
        torch.testing.assert_close(relative_difference(*pair), torch.tensor([0.02, 1.75, 0.25]))


def saving(folder):
    return [RandomState(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]


WAYS = {"cache to cache": (True, True), "live to cache": (False, True), "cache to live": (True, False)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_may_be_resumed_with_and_without_the_cache(
    kind, way, loads, tiny_model, pairs, make_data, make_trainer, tmp_path
):
    first, then = (str(tmp_path / "cache") if cached else False for cached in WAYS[way])
    source = ModelSource(path=str(tiny_model), **OTHERS[kind])
    until = {"max_epochs": 2} if first else {"max_steps": 6}  # Lightning sets loaders up at different moments
    options = {**until, "accumulate_grad_batches": 2}
    saver = make_trainer(**options, enable_checkpointing=True, callbacks=saving(tmp_path))
    whole = stage_of(source, first)
    want = fit(whole, make_data(pairs), saver)
    loads.clear()
    for step in (1, 4):
        resumed, again = stage_of(source, then), make_trainer(**options, callbacks=[RandomState()])
        got = fit(resumed, make_data(pairs), again, str(tmp_path / f"step={step}.ckpt"))
        assert 0 < len(got) < len(want) and again.global_step == saver.global_step
        if first and then:
            assert got == want[-len(got) :]
            assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
        else:
            assert_same_run(whole, resumed, want[-len(got) :], got)
    # A resumed policy is not what it was at its start: whoever checks the table loads the reference.
    assert len(loads) == (2 if kind == "full" else 0)


def test_a_table_that_is_made_after_a_resume_is_not_of_the_resumed_policy(
    tiny_model, pairs, make_data, make_trainer, tmp_path
):
    source = ModelSource(path=str(tiny_model))
    saver = make_trainer(max_steps=5, enable_checkpointing=True, callbacks=saving(tmp_path))
    fit(stage_of(source, str(tmp_path / "one")), make_data(pairs), saver)
    for folder in ("one", "two"):
        fit(
            stage_of(source, str(tmp_path / folder)),
            make_data(pairs),
            make_trainer(max_steps=6),
            str(tmp_path / "step=4.ckpt"),
        )
    (one,), (two,) = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.name == two.name and torch.equal(load_file(one)["logps"], load_file(two)["logps"])


def test_a_policy_that_was_changed_by_hand_is_not_taken_for_its_reference(
    loads, tiny_model, pairs, make_data, make_trainer, tmp_path
):
    def go(cache):
        stage = stage_of(ModelSource(path=str(tiny_model)), cache)
        stage.configure_model()
        with torch.no_grad():
            stage.policy.model.norm.weight += 0.1
        return stage, fit(stage, make_data(pairs), make_trainer(max_epochs=2))

    (live, want), (cached, got) = go(False), go(str(tmp_path))
    assert_same_run(live, cached, want, got)
    assert loads == ["policy", "policy"]
    assert dict(reversed(want))["train/loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_another_reference_is_refused(tiny_model, other_model, pairs, make_data, make_trainer, tmp_path):
    source, trainer = ModelSource(path=str(tiny_model)), make_trainer(max_epochs=1)
    fit(stage_of(source, str(tmp_path)), make_data(pairs), trainer)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = stage_of(source, str(tmp_path), reference=ModelSource(path=str(other_model)))
    with pytest.raises(ValueError, match="reference: its weights are not those"):
        fit(other, make_data(pairs), make_trainer(max_epochs=2), tmp_path / "one.ckpt")


def test_what_is_no_training_looks_at_the_reference_itself(tiny_model, pairs, make_data, make_trainer, tmp_path):
    source = ModelSource(path=str(tiny_model))
    live, cached = stage_of(source, False), stage_of(source, str(tmp_path))
    for stage in (live, cached):
        fit(stage, make_data(pairs), make_trainer(max_epochs=2))
    found = []
    for stage in (live, cached):
        stage.log = lambda name, value, **_: found[-1].append((name, float(value)))
        found.append([])
        trainer = make_trainer(limit_val_batches=1.0)
        trainer.validate(stage, datamodule=make_data(pairs[:9]), verbose=False)
    assert found[0] and [v for _, v in found[1]] == pytest.approx([v for _, v in found[0]], rel=1e-6, abs=1e-6)
    assert cached.reference is not None
    more = [fit(stage, make_data(pairs), make_trainer(max_epochs=1)) for stage in (live, cached)]
    assert_same_run(live, cached, *more)
    assert cached.reference is None


def test_files_that_changed_under_the_run_are_refused(
    tiny_model, other_model, pairs, make_data, make_trainer, tmp_path
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    stage = stage_of(ModelSource(path=str(folder)), str(tmp_path))
    fit(stage, make_data(pairs), make_trainer(max_steps=1))
    shutil.copytree(other_model, folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="reference: its files have changed since the run began"):
        make_trainer(limit_val_batches=1.0).validate(stage, datamodule=make_data(pairs), verbose=False)


def test_loaders_that_are_exchanged_on_the_way_are_noticed(tiny_model, pairs, make_data, make_trainer, tmp_path):
    class Exchanging(type(make_data(pairs))):
        asked, exchanges = 0, False

        def train_dataloader(self):
            self.asked += 1
            self.examples = list(self.examples)  # another object, the same pairs
            if self.exchanges and self.asked == 2:
                self.examples.reverse()
            return super().train_dataloader()

    settings = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    stage, data = stage_of(ModelSource(path=str(tiny_model)), str(tmp_path)), Exchanging(pairs)
    fit(stage, data, make_trainer(**settings))
    assert data.asked == 2
    data = Exchanging(pairs)
    data.exchanges = True
    with pytest.raises(ValueError, match="reference_cache: the data is not what it was when training started"):
        fit(stage_of(ModelSource(path=str(tiny_model)), str(tmp_path)), data, make_trainer(**settings))


def test_a_loss_without_a_reference_has_nothing_to_keep(tiny_model):
    with pytest.raises(ValueError, match="reference_cache: this loss looks at no reference"):
        LitDPO(ModelSource(path=str(tiny_model)), loss=ORPO(beta=0.1), reference_cache=True)


def test_a_start_from_scratch_is_refused(tiny_model):
    source = ModelSource(config={"model_type": "llama"}, tokenizer=str(tiny_model))
    with pytest.raises(ValueError, match="reference_cache: a network that starts from scratch"):
        LitDPO(source, reference_cache=True)


def test_streamed_data_is_refused_by_name(tiny_model, make_trainer, tmp_path):
    from datamodules import PreferenceDataModule

    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    data = PreferenceDataModule(train=str(path), tokenizer=str(tiny_model), streaming=True)
    stage = stage_of(ModelSource(path=str(tiny_model)), str(tmp_path))
    with pytest.raises(ValueError, match=r"leave model.reference_cache out, or data.streaming"):
        fit(stage, data, make_trainer(max_steps=2))


def test_a_folder_that_cannot_be_written_costs_the_next_run_its_start(
    tiny_model, pairs, make_data, make_trainer, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    source = ModelSource(path=str(tiny_model))
    live, cached = stage_of(source, False), stage_of(source, str(tmp_path / "file" / "cache"))
    want = fit(live, make_data(pairs), make_trainer(max_steps=2))
    with pytest.warns(UserWarning, match="the next run will have to compute them again"):
        assert_same_run(live, cached, want, fit(cached, make_data(pairs), make_trainer(max_steps=2)))


def test_the_kl_of_fresh_answers_needs_the_reference_itself(
    tiny_model, pairs, prompts, make_data, make_trainer, tmp_path
):
    from lit_align.batch import PromptBatch
    from lit_align.rollout.sampling import Sampling

    batch = PromptBatch(tuple(prompts[:2]), ({}, {}), torch.arange(2))
    for kind, measured in (("full", False), ("lora", True)):
        stage = stage_of(ModelSource(path=str(tiny_model), **OTHERS[kind]), str(tmp_path))
        fit(stage, make_data(pairs), make_trainer(max_steps=1))
        values = stage.kl_to_reference(batch, Sampling(max_new_tokens=3))
        assert (values is not None) == measured


def test_what_was_done_is_said(tiny_model, pairs, make_data, make_trainer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for word in ("computed in", "read from"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            fit(
                stage_of(ModelSource(path=str(tiny_model)), str(tmp_path), loss=IPO(beta=0.1)),
                make_data(pairs),
                make_trainer(max_steps=1),
            )
        assert any(f"20 training examples {word}" in record.getMessage() for record in caplog.records)
