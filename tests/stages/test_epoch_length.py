"""Steps that are given in tokens differ in number from epoch to epoch; Lightning follows."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.batch import plan
from lit_align.callbacks.random_state import RandomState
from lit_align.models.source import ModelSource
from lit_align.stages import LitSFT

EPOCHS = 6


@pytest.fixture(autouse=True)
def _narrow_windows(monkeypatch):
    """Windows of a few examples: among all of them best-fit needs the same number of steps in every epoch."""
    monkeypatch.setattr(plan, "WINDOW", 5)


class Watch(Callback):
    """Notes the examples of every epoch, and after how many steps each validation comes."""

    def __init__(self):
        self.epochs, self.validated = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.epochs:  # not inside an epoch that was resumed
            self.epochs[-1] += batch.indices.tolist()

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)


def fit(make_trainer, data, model, folder, accumulate=1, checkpoint=None):
    torch.manual_seed(0)
    watch = Watch()
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1.0,
        enable_checkpointing=True,
        callbacks=[RandomState(), saving, watch],
    )
    stage = LitSFT(ModelSource(path=str(model)))
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint)
    return watch, stage, trainer


def test_every_epoch_is_whole_and_validated_at_its_end(tiny_model, conversations, make_data, make_trainer, tmp_path):
    data = make_data(conversations, batch_size=None, max_tokens=60)
    watch, _, trainer = fit(make_trainer, data, tiny_model, tmp_path, accumulate=2)
    lengths = [len(data.loader.plan(epoch)) for epoch in range(EPOCHS)]
    assert len(set(lengths)) > 1 and trainer.global_step == sum(lengths)
    assert all(sorted(seen) == list(range(len(conversations))) for seen in watch.epochs) and len(watch.epochs) == EPOCHS
    assert watch.validated == [sum(lengths[: n + 1]) for n in range(EPOCHS)]


def test_a_run_is_resumed_inside_any_epoch(tiny_model, conversations, make_data, make_trainer, tmp_path):
    def data():
        return make_data(conversations, batch_size=None, max_tokens=60)

    whole, stage, trainer = fit(make_trainer, data(), tiny_model, tmp_path / "whole")
    for step in range(1, trainer.global_step):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        rest, again, other = fit(make_trainer, data(), tiny_model, tmp_path / "rest", checkpoint=path)
        assert other.global_step == trainer.global_step
        assert whole.validated[-len(rest.validated) :] == rest.validated
        assert all(torch.equal(value, stage.state_dict()[name]) for name, value in again.state_dict().items())
