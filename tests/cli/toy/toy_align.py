"""A stage and a data module small enough to train in a blink, with the arguments that real ones have."""

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class ToySource:
    path: str | None = None
    tokenizer: str | None = None
    dropout: float = 0.5


class ToyLoss:
    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta


class ToyHinge(ToyLoss):
    def __init__(self, beta: float = 0.1, margin: float = 1.0) -> None:
        if margin < 0:
            int("not a number")  # a bug: a ValueError that nobody raised on purpose
        super().__init__(beta)


class LitToy(LightningModule):
    def __init__(
        self,
        policy: ToySource,
        loss: ToyLoss = ToyLoss(beta=0.1),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.1),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.optimizer, self.loss = optimizer, loss
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(policy.dropout), torch.nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        loss = self.loss.beta * self.net(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch[0]).square().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return [{"index": batch_idx, "value": self.net(batch[0]).mean()}]

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class ToyData(LightningDataModule):
    def __init__(self, path: str, tokenizer: str | None = None, batch_size: int = 4) -> None:
        super().__init__()
        self.path, self.tokenizer, self.batch_size = path, tokenizer, batch_size

    def setup(self, stage: str) -> None:
        if self.path == "a bug":
            int(self.path)

    def train_dataloader(self):
        # A generator of its own: without one, iterating draws from the global one and shifts dropout.
        return DataLoader(
            TensorDataset(torch.arange(16.0).view(8, 2)), batch_size=self.batch_size, generator=torch.Generator()
        )

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
