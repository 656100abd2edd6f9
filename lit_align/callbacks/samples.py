"""Answers to held-out prompts, and how many of them are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed

from lit_align.batch import PromptBatch
from lit_align.rollout.sampling import Answer, Sampling

RIGHT = "val/judged_right"
KL = "val/kl_to_reference"
COLUMNS = ("step", "prompt", "answer", "finished", "right")


class JudgeAnswers(Callback):
    """Lets the policy answer held-out prompts at the end of training, and after every so many validations.

    Answers go to `samples.jsonl` in the run folder (and to W&B as a table); with a judge the share of right ones is
    logged as `val/judged_right` (an answer that was cut off at `max_new_tokens` is wrong). The stage has a `tokenizer`
    and a method `answer(prompt_ids, sampling)` that gives an `Answer` for each prompt. If it has a
    method `kl_to_reference(batch, sampling)` (for each prompt, log policy - log reference in nats of an answer sampled
    from the policy; None without a reference), its mean is logged as `val/kl_to_reference`. Training is not disturbed:
    its random numbers are put back.

    Args:
        prompts: Data module whose `predict_dataloader` yields `PromptBatch`es.
        judge: Import path of `f(record, answer) -> bool`; None = only write the answers down.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 = the most probable token.
        max_prompts: Answer at most so many prompts; None = all.
        every: Also answer after every so many validations; 0 = only at the end.
        seed: Of sampling, so that answers at different steps can be compared.
    """

    def __init__(
        self,
        prompts: LightningDataModule,
        judge: Callable[[dict, str], bool] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        max_prompts: int | None = None,
        every: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.prompts, self.judge = prompts, judge
        self.sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        self.max_prompts, self.every, self.seed = max_prompts, every, seed
        self.results: dict[str, float] = {}
        self._validations = 0
        self._judged_at: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the prompts; they are not attached to the trainer, so that every rank has all of them."""
        if stage not in ("fit", "validate"):
            return
        if trainer.local_rank == 0:
            self.prompts.prepare_data()
        trainer.strategy.barrier()
        self.prompts.setup("predict")

    def state_dict(self) -> dict[str, int]:
        """How many validations there were, so that a resumed run answers at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Puts the count back."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers and judges, when it is this validation's turn."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        alone = trainer.state.fn == "validate"
        if alone or (self.every > 0 and self._validations % self.every == 0):
            self._run(trainer, pl_module)
            for name, value in self.results.items():
                pl_module.log(name, value, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers and judges, unless the last validation just did."""
        if trainer.fast_dev_run or self._judged_at == trainer.global_step:
            return
        self._run(trainer, pl_module)
        for logger in trainer.loggers if self.results else ():
            logger.log_metrics(self.results, step=trainer.global_step)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            torch.manual_seed(self.seed)
            rows = self._gather(list(self._rows(trainer, pl_module)))
        self.results = {
            name: mean for name, key in ((RIGHT, "right"), (KL, "kl")) if (mean := _mean(rows, key)) is not None
        }
        self._judged_at = trainer.global_step
        if trainer.is_global_zero and not trainer.fast_dev_run:
            _write(trainer, rows)

    def _rows(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[str, Any]]:
        """Rows of this rank's share of the batches.

        Every rank answers equally many batches, for sharded models need all ranks in each forward; what a rank answers
        only to keep step is dropped.
        """
        batches = list(self._batches())
        world, rank = trainer.world_size, trainer.global_rank
        for start in range(0, len(batches), world):
            own = start + rank < len(batches)
            batch = batches[start + rank if own else start].to(pl_module.device)
            answers = pl_module.answer(batch.prompt_ids, self.sampling)
            kl = self._kl(batch, pl_module)
            if own:
                yield from self._judged(batch, answers, kl, trainer.global_step, pl_module)

    def _kl(self, batch: PromptBatch, pl_module: LightningModule) -> list[float | None]:
        """One sample of log policy - log reference for each prompt; the mean over answers of both is the KL."""
        measure = getattr(pl_module, "kl_to_reference", None)
        # Answers have to come from the policy's own distribution, whatever the judged ones are taken from.
        values = None if measure is None else measure(batch, replace(self.sampling, temperature=1.0))
        return [None] * len(batch) if values is None else list(values)

    def _judged(
        self, batch: PromptBatch, answers: list[Answer], kl: list[float | None], step: int, pl_module: LightningModule
    ) -> Iterator[dict[str, Any]]:
        decode = pl_module.tokenizer.decode
        rows = zip(batch.indices.tolist(), batch.prompt_ids, batch.records, answers, kl, strict=True)
        for index, prompt_ids, record, answer, nats in rows:
            text = decode(answer.input_ids, skip_special_tokens=True)
            # What was cut off may look right, and it is not: the policy did not know where to stop.
            right = None if self.judge is None else answer.finished and bool(self.judge(record, text))
            row = {"step": step, "index": index, "prompt": decode(prompt_ids), "answer": text}
            yield row | {"finished": answer.finished, "right": right, "kl": nats}

    def _batches(self) -> Iterator[PromptBatch]:
        left = self.max_prompts
        for batch in self.prompts.predict_dataloader():
            if left is not None and len(batch) >= left:
                yield PromptBatch(batch.prompt_ids[:left], batch.records[:left], batch.indices[:left])
                return
            left = None if left is None else left - len(batch)
            yield batch

    @staticmethod
    def _gather(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not (distributed.is_available() and distributed.is_initialized()):
            return rows
        shares: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, rows)
        return sorted((row for share in shares for row in share), key=lambda row: row["index"])


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def _write(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    path = Path(trainer.default_root_dir) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_text("samples", columns=list(COLUMNS), data=[[row[c] for c in COLUMNS] for row in rows])
