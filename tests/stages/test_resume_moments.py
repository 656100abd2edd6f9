"""Wherever in Lightning's loop a checkpoint is written, and however often a run is resumed, it is the same run."""

import os
import signal
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_align.callbacks import Checkpoints, Preemption, RandomState
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.stages import LitSFT


class Watch(Callback):
    """Notes when it was validated, when an epoch began, and what was logged under which step."""

    def __init__(self):
        self.validated, self.begun, self.logged = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.begun.append((trainer.current_epoch, trainer.global_step))

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        loop = trainer.fit_loop.epoch_loop
        if (loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches == 0:
            assert loop._batches_that_stepped == trainer.global_step  # where callbacks log

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.logged.append((step, float(trainer.callback_metrics["train/loss"])))


def fit(model, data, make_trainer, saver, checkpoint=None, lora=None, **options):
    torch.manual_seed(0)
    stage, watch = LitSFT(ModelSource(path=str(model), lora=lora)), Watch()
    settings = {"max_epochs": 3, "limit_val_batches": 1, "enable_checkpointing": True}
    trainer = make_trainer(**settings | options, callbacks=[RandomState(), saver, watch])
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint)
    return stage, watch, trainer


def same(stage, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in stage.state_dict().items())


def paths(folder):
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.lstrip("step=")))


class KeepAll(Checkpoints):
    """The same checkpoints, none of them removed."""

    def __init__(self, folder, every_n_steps):
        super().__init__(str(folder), every_n_steps)
        self.save_top_k, self.save_last = -1, None


OPTIONS = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": 8},
    "validated after every step": {"val_check_interval": 2, "accumulate_grad_batches": 2},
    "validated by steps": {"max_epochs": -1, "max_steps": 9, "val_check_interval": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["ours", "after validation"])
def test_nothing_is_missed_or_made_twice(options, kind, tiny_model, conversations, make_data, make_trainer, tmp_path):
    """Resumed from every checkpoint of the whole run, and again from one that the resumed run wrote."""

    def saver(folder):
        if kind == "ours":
            return KeepAll(folder, 1)
        return ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=False)

    def go(folder, checkpoint=None):
        return fit(tiny_model, make_data(conversations), make_trainer, saver(tmp_path / folder), checkpoint, **options)

    whole = go("whole")
    saved = paths(tmp_path / "whole")
    assert len(saved) >= 2
    for number, path in enumerate(saved[:-1]):
        check(go(f"first{number}", path), whole)
        check(go(f"second{number}", paths(tmp_path / f"first{number}")[0]), whole)


def check(resumed, whole):
    (stage, watch, trainer), (want_stage, want, want_trainer) = resumed, whole
    assert same(stage, want_stage) and trainer.global_step == want_trainer.global_step
    start = want_trainer.global_step - len(watch.logged)
    assert watch.logged == want.logged[start:]
    assert watch.validated == [step for step in want.validated if step > start]
    assert watch.begun == [(epoch, step) for epoch, step in want.begun if step >= start]


def test_dropout_draws_as_it_did_though_a_step_is_made_in_parts(
    tiny_model, conversations, make_data, make_trainer, tmp_path
):
    def go(folder, checkpoint=None):
        options = {"accumulate_grad_batches": 2, "lora": LoraSettings(r=4, dropout=0.3), "limit_val_batches": 0}
        saver = KeepAll(tmp_path / folder, 1)
        return fit(tiny_model, make_data(conversations), make_trainer, saver, checkpoint, **options)[0]

    stage = go("whole")
    first = go("first", tmp_path / "whole" / "step000002.ckpt")
    second = go("second", tmp_path / "first" / "step000004.ckpt")
    assert same(first, stage) and same(second, stage)
    # A run that has just been resumed does not write again what it was resumed from.
    assert paths(tmp_path / "first")[0].name == "step000003.ckpt"


@pytest.mark.parametrize("stop", [2, 3, 4, 8])
@pytest.mark.parametrize("more", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 9}], ids=["epochs", "steps"])
def test_a_run_that_was_ended_early_goes_on_with_the_rest_of_its_epoch(
    stop, more, tiny_model, conversations, make_data, make_trainer, tmp_path
):
    def go(folder, checkpoint=None, **options):
        saver = Checkpoints(str(tmp_path / folder))
        return fit(
            tiny_model, make_data(conversations), make_trainer, saver, checkpoint, limit_val_batches=0, **options
        )

    _, _, whole = go("whole", **more)
    go("short", max_steps=stop)
    _, watch, longer = go("long", tmp_path / "short" / f"step{stop:06d}.ckpt", **more)
    assert whole.global_step == longer.global_step == 9
    assert longer.current_epoch == whole.current_epoch
    assert [epoch for epoch, _ in watch.begun] == [epoch for epoch in range(3) if 3 * epoch >= stop]


@pytest.fixture
def in_front():
    """Ctrl-C as a process in front of a terminal has it; Lightning ignores it after the first one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminated(Callback):
    """Sends the process a signal before a step."""

    def __init__(self, step, sent=signal.SIGTERM):
        self.step, self.sent = step, sent

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.sent)


@pytest.mark.parametrize(
    "step, sent", [(0, signal.SIGTERM), (1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGINT)]
)
def test_a_validation_that_is_due_is_made_before_a_run_is_stopped(
    step, sent, in_front, tiny_model, conversations, make_data, make_trainer, tmp_path
):
    def go(folder, *callbacks, checkpoint=None):
        stage, watch = LitSFT(ModelSource(path=str(tiny_model))), Watch()
        torch.manual_seed(0)
        callbacks = [RandomState(), KeepAll(tmp_path / folder, None), *callbacks, watch]
        options = {"max_epochs": 2, "limit_val_batches": 1, "val_check_interval": 2, "enable_checkpointing": True}
        trainer = make_trainer(**options, callbacks=callbacks)
        try:
            trainer.fit(stage, datamodule=make_data(conversations), ckpt_path=checkpoint)
        except SIGTERMException:
            watch.stopped = True
        return stage, watch, trainer

    before = signal.getsignal(sent)
    whole = go("whole")
    _, stopped, _ = go("stopped", Preemption(str(tmp_path)), Terminated(step, sent))
    assert stopped.stopped and signal.getsignal(sent) == before
    rest = go("rest", checkpoint=tmp_path / f"preempted-step{step + 1:06d}.ckpt")
    assert same(rest[0], whole[0])
    assert stopped.validated + rest[1].validated == whole[1].validated
    assert stopped.logged + rest[1].logged == whole[1].logged


def test_a_second_ctrl_c_ends_the_run_at_once(
    in_front, tiny_model, conversations, make_data, make_trainer, tmp_path, capsys
):
    class Twice(Terminated):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(max_epochs=2, callbacks=[Preemption(str(tmp_path)), Twice(0)])
    with pytest.raises(SystemExit):
        trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=make_data(conversations))
    assert trainer.global_step == 0 and not list(tmp_path.glob("*.ckpt"))
    assert "stops after this step, with a checkpoint; once more: at once" in capsys.readouterr().err


def test_a_limit_that_ends_inside_a_step_is_refused(tiny_model, conversations, make_data, make_trainer):
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=3)
    with pytest.raises(ValueError, match=r"leaves 3 micro-batches an epoch.*expected a multiple, such as 2"):
        trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=make_data(conversations))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_do_not_validate_by_their_own_clocks(
    ranks, tiny_model, conversations, make_data, make_trainer, monkeypatch
):
    trainer = make_trainer(max_steps=1, val_check_interval="00:00:01:00")
    monkeypatch.setattr(Trainer, "world_size", ranks)
    refused = pytest.raises(ValueError, match=r"val_check_interval: .*with 2 devices") if ranks > 1 else nullcontext()
    with refused:
        trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=make_data(conversations))


def test_another_optimizer_is_refused(tiny_model, conversations, make_data, make_trainer, tmp_path):
    def stage(lr):
        return LitSFT(ModelSource(path=str(tiny_model)), optimizer=lambda p: torch.optim.AdamW(p, lr=lr))

    trainer = make_trainer(max_epochs=1)
    trainer.fit(stage(1e-3), datamodule=make_data(conversations))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"lr: the run began with 0.001, now it is 0.005"):
        make_trainer(max_epochs=2).fit(
            stage(5e-3), datamodule=make_data(conversations), ckpt_path=tmp_path / "one.ckpt"
        )


def test_a_tokenizer_that_was_used_in_between_is_the_same(tiny_model, conversations, make_data, make_trainer, tmp_path):
    stage, trainer = LitSFT(ModelSource(path=str(tiny_model))), make_trainer(max_epochs=1)
    trainer.fit(stage, datamodule=make_data(conversations))
    stage.tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert stage.tokenizer.backend_tokenizer.padding is not None  # what was set stays set
    make_trainer(max_epochs=2).fit(
        LitSFT(ModelSource(path=str(tiny_model))), datamodule=make_data(conversations), ckpt_path=tmp_path / "one.ckpt"
    )
