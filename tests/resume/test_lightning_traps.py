"""What goes wrong with Lightning's own resume, and does not here: each test names the trap."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import SFTDataModule
from lit_align.callbacks import RandomState


class Reader(lightning.LightningModule):
    """Notes which examples it was given."""

    def __init__(self, *, asks_for_steps):
        super().__init__()
        self.asks_for_steps, self.given = asks_for_steps, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.given.append(batch.indices.tolist())
        return (self.weight * torch.rand(1)).sum()

    def configure_optimizers(self):
        if self.asks_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def go(tmp_path, tiny_model, monkeypatch):
    """Two epochs of 10 steps, from a checkpoint if there is one: what was given, and the weight at the end."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(f'{{"question": "what is {i}?", "answer": "it is {i}"}}\n' for i in range(20)))

    def run(checkpoint=None, *, workers=0, asks_for_steps=True):
        torch.manual_seed(0)
        reader = Reader(asks_for_steps=asks_for_steps)
        data = SFTDataModule(train=str(file), tokenizer=str(tiny_model), batch_size=2, num_workers=workers)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                RandomState(),
                ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1),
            ],
        )
        trainer.fit(reader, datamodule=data, ckpt_path=checkpoint)
        return reader.given, float(reader.weight)

    return run


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [3, 10, 13])
def test_the_rest_of_the_epoch_is_seen_not_its_start_again(step, workers, go, tmp_path):
    whole, weight = go()
    rest, again = go(tmp_path / "saved" / f"step={step}.ckpt", workers=workers)
    assert rest == whole[step:] and again == weight


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_after_the_one_that_was_resumed_has_the_same_order(workers, go, tmp_path):
    whole, _ = go()
    rest, _ = go(tmp_path / "saved" / "step=3.ckpt", workers=workers)
    assert rest[7:] == whole[10:]


def test_asking_for_the_number_of_steps_does_not_lose_the_place(go, tmp_path):
    """It builds the loader before the checkpoint is restored."""
    whole, _ = go()
    path = tmp_path / "saved" / "step=3.ckpt"
    assert go(path, asks_for_steps=True)[0] == go(path, asks_for_steps=False)[0] == whole[3:]
