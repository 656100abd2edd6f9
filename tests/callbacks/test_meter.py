"""The meter: what it counts, what it leaves out, and what its figures are divided by."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from torch import nn

from lit_align.batch import Branch, Example, StepTotals, Work, pack, pad
from lit_align.callbacks import Meter
from lit_align.callbacks import meter as module
from lit_align.callbacks.clock import Clock
from lit_align.callbacks.figures import COUNT, PHASE, compute_dtype, figures, in_words, of_whole_run, short
from lit_align.machine import Machine
from lit_align.models.flops import Flops

MACHINE = Machine(1000.0, 100.0)
COST = Flops(token=2.0, scored=3.0, sequence=5.0, pair=1.0)
COUNTED = {"seconds": 4.0, "waited": 1.0, "steps": 2, **Work(6, 12, 100, 130, 200, 70, 50, 600.0)._asdict()}


def test_figures_by_hand():
    found = figures(COUNTED, COST, MACHINE, 25, ranks=2)
    flops = 2 * 100 + 3 * 50 + 5 * 12 + 600
    assert found == {
        "share_data_wait": 0.25,
        "tokens_per_second": 25.0,
        "examples_per_second": 1.5,
        "share_padding": 0.35,
        "share_prefix_saved": 0.0,  # a rectangle repeats every prompt
        "model_flops_per_second": flops / 4,
        "share_of_floor": (flops / 2 / 1000 + 2 * 25 / 100) / 4,
    }
    packed = COUNTED | {"computed": 100, "padding": 0}
    assert figures(packed, COST, MACHINE, 25, 1)["share_prefix_saved"] == 30 / 130


def test_rollouts_are_neither_waiting_nor_update():
    counted = COUNTED | {"waited": 2.5, PHASE + "rollout": 1.5, PHASE + "scoring": 0.5, COUNT + "answers": 6}
    found = figures(counted, COST, MACHINE, 0, ranks=1)
    assert found["phase/rollout"] == 1.5 / 4 and found["phase/update"] == 0.5
    assert found["share_data_wait"] == 0.5 / 4
    assert found["tokens_per_second"] == 100 / 2
    assert found["rollout/answers_per_second"] == 4.0
    before = COUNTED | {"waited": 2.5, PHASE + "rollout": 0.0, COUNT + "answers": 0}
    assert figures(before, COST, MACHINE, 0, ranks=1)["phase/update"] == 1.0
    whole = of_whole_run(figures(before, COST, MACHINE, 0, ranks=1))
    assert "tokens_per_second" in whole and not [name for name in whole if name.startswith("phase/")]
    assert of_whole_run(found) == found


def test_what_cannot_be_told_is_left_out():
    nothing = COUNTED | Work()._asdict()
    assert figures(nothing, None, None, 0, 1) == {"share_data_wait": 0.25}
    assert "model_flops_per_second" not in figures(COUNTED, None, None, 0, 1)
    assert "share_of_floor" not in figures(COUNTED, COST, None, 0, 1)
    assert figures(COUNTED | {"seconds": 0.0}, COST, MACHINE, 0, 1) == {}


@pytest.mark.parametrize(
    "number, text", [(0.25, "0.25"), (12, "12"), (1234.0, "1.23k"), (45.6e6, "45.6M"), (7.9e14, "790T"), (2e15, "2P")]
)
def test_short_numbers(number, text):
    assert short(number) == text


def test_the_line_for_people():
    line = in_words(figures(COUNTED, COST, MACHINE, 25, 1), MACHINE, torch.bfloat16)
    assert line == (
        "25 tokens/s, 1.5 examples/s, 252 FLOP/s = 0.38 of the machine's floor (1 kFLOP/s in bfloat16, 100 B/s), "
        "padding 35.0%, saved by shared prefixes 0.0%, data wait 25.0%"
    )


def test_the_type_that_a_run_multiplies_in():
    weights = [torch.zeros(9, dtype=torch.bfloat16), torch.zeros(3), torch.zeros(99, dtype=torch.uint8)]
    assert compute_dtype("32-true", weights) == torch.bfloat16
    assert compute_dtype("bf16-mixed", weights[1:]) == torch.bfloat16
    assert compute_dtype("16-mixed", weights) == torch.float16


class Hands:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def move(self, seconds):
        self.now += seconds


def test_a_clock_stands_still_in_pauses_and_so_do_the_counters(monkeypatch):
    hands, grown, called = Hands(monkeypatch), {"a": 1.0}, []
    owner = SimpleNamespace(save=lambda x: (hands.move(5), grown.update(a=grown["a"] + 10), x)[-1], fetch=None)
    clock = Clock(lambda: grown, lambda: called.append(hands.now))
    before = clock.now()
    hands.move(1)
    clock.pause_during(owner, "save")
    with clock.pause():  # a checkpoint inside a validation
        hands.move(3)
        assert owner.save(7) == 7
    hands.move(2)
    assert owner.save(8) == 8
    grown["a"] += 4
    after = clock.now()
    assert after["seconds"] - before["seconds"] == 3
    assert after["a"] - before["a"] == 4
    assert called == [101.0, 111.0], "the device is waited for once a pause, at its beginning"
    with pytest.raises(ValueError), clock.pause():
        hands.move(1)
        raise ValueError
    assert clock.now()["seconds"] == after["seconds"]


def test_a_clock_gives_methods_back(monkeypatch):
    class Owner:
        def before(self):
            return "before"

        def after(self):
            return "after"

        def run(self):
            return "run"

    hands, owner = Hands(monkeypatch), Owner()
    own = owner.after = lambda: "own"
    clock = Clock(dict, lambda: None)
    clock.wait_between(owner, "before", "after")
    clock.pause_during(owner, "run")
    owner.before()
    hands.move(3)
    owner.after()
    hands.move(4)
    assert clock.waited == 3 and owner.run() == "run"
    clock.release()
    assert vars(owner) == {"after": own}


# -- in a run


class Steps(LightningModule):
    """Takes a second for a micro-batch, three for validation; its loader another half."""

    def __init__(self, hands, batches):
        super().__init__()
        self.layer, self.hands, self.batches = nn.Linear(1, 1), hands, batches

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def step_flops(self):
        return COST

    def training_step(self, batch, batch_idx):
        self.hands.move(1.0 if self.trainer.global_step else 50.0)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.hands.move(3)

    def train_dataloader(self):
        return Slow(self.hands, self.batches)

    def val_dataloader(self):
        return [0, 1]


class Slow:
    def __init__(self, hands, batches):
        self.hands, self.batches = hands, batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.hands.move(0.5)
            yield batch


class SlowCheckpoint(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        pl_module.hands.move(20)


class Saves(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint(trainer.default_root_dir + "/x.ckpt")


class Logged(Logger):
    name = version = ""

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values |= {step: metrics} if "perf/share_data_wait" in metrics else {}

    def log_hyperparams(self, *args):
        pass


def batches(count, lay_out=pack):
    example = Example(torch.arange(3), (Branch(torch.arange(4), torch.ones(4)), Branch(torch.arange(2), torch.ones(2))))
    return [lay_out([example] * 2, [0, 1], StepTotals(1.0, 1.0)) for _ in range(count)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def fit(meter, count=8, lay_out=pack, **options):
        hands, logged = Hands(monkeypatch), Logged()
        stage = Steps(hands, batches(count, lay_out))
        trainer = Trainer(
            **{
                "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": logged, "log_every_n_steps": 2,
                "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
                "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "accumulate_grad_batches": 2,
                "val_check_interval": 4, "callbacks": [meter, SlowCheckpoint(), Saves()],
            } | options
        )  # fmt: skip
        trainer.fit(stage)
        return trainer, stage, logged.values

    return fit


def test_a_run_counts_its_steps_without_warm_up_validation_and_checkpoints(run, capsys):
    meter = Meter(flops_per_second=1000.0, bytes_per_second=100.0)
    trainer, stage, logged = run(meter)
    assert trainer.global_step == 8
    # Each micro-batch: 2 pairs of 3 + 4 + 2 tokens, half a second of loading, one of work.
    found = meter.results
    assert found["perf/tokens_per_second"] == pytest.approx(18 / 1.5)
    assert found["perf/examples_per_second"] == pytest.approx(2 / 1.5)
    assert found["perf/share_data_wait"] == pytest.approx(0.5 / 1.5)
    assert found["perf/share_prefix_saved"] == pytest.approx(3 / 12)
    flops = 2 * 18 + 3 * 12 + 5 * 4 + 2 * (4.5 + 12 + 8 + 6 + 2)
    assert found["perf/model_flops_per_second"] == pytest.approx(flops / 1.5)
    # Two float32 weights and no state: 4 bytes, read and written, weight and gradient.
    assert found["perf/share_of_floor"] == pytest.approx((2 * flops / 1000 + 2 * 16 / 100) / 3)
    assert found["perf/memory_rss_gib"] > 0.05
    assert found["perf/machine_flops_per_second"] == 1000.0
    # Under the numbers that the stages' own values have: 0 is the first step.
    assert {step: round(values["perf/tokens_per_second"], 4) for step, values in logged.items()} == {
        1: 12.0, 3: 12.0, 5: 12.0, 7: 12.0
    }  # fmt: skip
    assert "speed: 12 tokens/s" in capsys.readouterr().out and "7 steps" in meter_line(meter, trainer, stage, capsys)


def meter_line(meter, trainer, stage, capsys):
    meter.on_train_end(trainer, stage)
    return capsys.readouterr().out


def test_it_lets_go_of_the_trainer(run):
    trainer, _, _ = run(Meter(flops_per_second=1.0, bytes_per_second=1.0))
    loop = trainer.fit_loop.epoch_loop
    assert "save_checkpoint" not in vars(trainer) and "run" not in vars(loop.val_loop)
    assert not {"_on_before_fetch", "_on_after_fetch"} & set(vars(loop))


def test_padding_is_not_useful(run):
    meter = Meter(flops_per_second=1000.0, bytes_per_second=100.0)
    run(meter, lay_out=pad)
    assert meter.results["perf/tokens_per_second"] == pytest.approx(18 / 1.5)
    assert meter.results["perf/share_padding"] == pytest.approx(4 / 28)
    assert meter.results["perf/share_prefix_saved"] == 0.0


def test_the_steps_after_the_last_logged_one_count_too(run):
    meter = Meter(flops_per_second=1000.0, bytes_per_second=100.0)
    run(meter, log_every_n_steps=1000, max_epochs=1)
    assert meter.results["perf/tokens_per_second"] == pytest.approx(18 / 1.5)


def test_a_run_of_warm_up_alone_says_so(run, capsys):
    meter = Meter(warmup_steps=8, flops_per_second=1000.0, bytes_per_second=100.0)
    run(meter)
    assert meter.results == {} and "speed: not measured" in capsys.readouterr().out


def test_without_warm_up_the_first_step_counts(run):
    meter = Meter(warmup_steps=0, flops_per_second=1000.0, bytes_per_second=100.0)
    run(meter)
    assert meter.results["perf/tokens_per_second"] == pytest.approx(16 * 18 / (14 * 1.5 + 2 * 50.5))


def test_rates_that_are_not_given_are_measured(run, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "this_machine", lambda *key: asked.append(key) or Machine(7.0, 8.0))
    meter = Meter(bytes_per_second=5.0)
    run(meter)
    assert asked == [(torch.device("cpu"), torch.float32)]
    assert (meter.results["perf/machine_flops_per_second"], meter.results["perf/machine_bytes_per_second"]) == (
        7.0,
        5.0,
    )


def test_a_cost_that_cannot_be_told_ends_no_run(run, monkeypatch):
    def unknown(self):
        raise RuntimeError("a network of\na new kind")

    monkeypatch.setattr(Steps, "step_flops", unknown)
    meter = Meter()
    with pytest.warns(UserWarning, match="model FLOPs are left out, as they cannot be told: a network of$"):
        trainer, _, _ = run(meter)
    assert trainer.global_step == 8
    assert meter.results["perf/tokens_per_second"] == pytest.approx(18 / 1.5)
    assert not {"perf/model_flops_per_second", "perf/share_of_floor"} & set(meter.results)


def test_one_short_figure_in_the_progress_bar(run):
    class Bar(TQDMProgressBar):
        shown = ()

        def get_metrics(self, *args):
            self.shown = super().get_metrics(*args)
            return self.shown

    bar = Bar()
    meter = Meter(flops_per_second=1000.0, bytes_per_second=100.0)
    run(meter, enable_progress_bar=True, callbacks=[meter, bar])
    assert {name: value for name, value in bar.shown.items() if "perf" in name or "tok" in name} == {"tok/s": "12"}


def test_nothing_of_it_is_in_a_checkpoint(run, tmp_path):
    run(Meter(flops_per_second=1.0, bytes_per_second=1.0))
    assert "Meter" not in json.dumps(list(torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]))


@pytest.mark.parametrize("wrong", [{"warmup_steps": -1}, {"flops_per_second": 0.0}, {"bytes_per_second": -1.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="Meter: expected"):
        Meter(**wrong)


class Rolls(Steps):
    """Its loader rolls out for 0.4 of its half a second; validation, which is not counted, too."""

    def __init__(self, hands, batches):
        super().__init__(hands, batches)
        self.phase_seconds, self.rollout_counts = {"rollout": 0.0, "scoring": 0.0}, {}

    def on_train_batch_start(self, batch, batch_idx):
        self.phase_seconds["rollout"] += 0.25
        self.phase_seconds["scoring"] += 0.15
        self.rollout_counts["sampled_tokens"] = self.rollout_counts.get("sampled_tokens", 0) + 10

    def validation_step(self, batch, batch_idx):
        self.on_train_batch_start(batch, batch_idx)


def test_phases_of_a_stage_are_told_apart_from_the_update(run, monkeypatch):
    monkeypatch.setitem(run.__globals__, "Steps", Rolls)
    meter = Meter(flops_per_second=1000.0, bytes_per_second=100.0)
    run(meter)
    found = meter.results
    assert found["perf/phase/rollout"] == pytest.approx(0.25 / 1.5)
    assert found["perf/phase/scoring"] == pytest.approx(0.15 / 1.5)
    assert found["perf/phase/update"] == pytest.approx(1.1 / 1.5)
    assert found["perf/share_data_wait"] == pytest.approx(0.1 / 1.5)
    assert found["perf/tokens_per_second"] == pytest.approx(18 / 1.1)
    assert found["perf/rollout/sampled_tokens_per_second"] == pytest.approx(10 / 0.25)
    assert found["perf/rollout/answers_per_second"] == 0.0
