"""The peer's side: a TRL trainer on the same token ids. One process measures one way to run it.

Usage (in the peer's environment): python -m benchmarks.peers.trl_side CASE VARIANT SCRATCH OUT.json

What is added to TRL is what it lacks to be given token ids, to be counted, or to reach its own options: DPO takes text
alone, so its preparation of the data is passed over; sampling by length needs a column that the trainer would remove.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.meter import Meter, digest
from benchmarks.settings import CASES, Case, Settings
from benchmarks.tokens import load_tokens, signature, unique_tokens


class Stamp(TrainerCallback):
    """Stamps the end of every step."""

    def __init__(self, meter: Meter, *models: Any) -> None:
        self.meter, self.models = meter, models

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All weights are in memory."""
        self.meter.loaded(*self.models)
        self.meter.stamp()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self.meter.stamp()


class Watched:
    """Mixed into a trainer: keeps each step's loss and batch, and the first gradient norm."""

    meter: Meter
    batches: list[dict[str, Any]]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; what it was given is kept."""
        self.batches.append({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.meter.losses.append(loss.detach())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if self.meter.grad_norm is None:
            self.meter.grad_norm = float(norm)
        return norm

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "length" not in self._signature_columns:
            self._signature_columns.append("length")


class SFT(Watched, SFTTrainer):
    """Counted."""


class Reward(Watched, RewardTrainer):
    """Counted."""


class DPO(Watched, DPOTrainer):
    """Counted; takes token ids, and the time of its precomputed log-probabilities."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        begin = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.meter.extra_seconds += time.perf_counter() - begin
        return dataset


def dataset_of(case: Case, rows: list[dict[str, Any]]) -> Dataset:
    """The rows in the columns that the trainer knows."""
    if case.stage == "sft":
        columns = [
            {
                "input_ids": row["branches"][0],
                "labels": [
                    token if weight > 0 else -100
                    for token, weight in zip(row["branches"][0], row["weights"][0], strict=True)
                ],
                "length": len(row["branches"][0]),
            }
            for row in rows
        ]
    elif case.stage == "dpo":
        columns = [
            {
                "prompt_ids": row["prompt"],
                "chosen_ids": row["branches"][0],
                "rejected_ids": row["branches"][1],
                "length": len(row["prompt"]) + max(map(len, row["branches"])),
            }
            for row in rows
        ]
    else:
        columns = [
            {
                "chosen_ids": row["prompt"] + row["branches"][0],
                "rejected_ids": row["prompt"] + row["branches"][1],
                "length": len(row["prompt"]) + max(map(len, row["branches"])),
            }
            for row in rows
        ]
    return Dataset.from_list(columns)


def arguments(case: Case, variant: str, settings: Settings, rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """The trainer's arguments: the shared settings, then what the variant is."""
    given: dict[str, Any] = {
        "output_dir": str(out.parent / "trl"),
        "per_device_train_batch_size": settings.batch_size,
        "max_steps": settings.warmup + settings.steps,
        "max_length": settings.max_length,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_epsilon": settings.eps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "optim": "adamw_torch_fused",
        "logging_steps": settings.log_every,
        "bf16": False,
        "seed": settings.seed,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": settings.device == "cpu",
        "dataloader_pin_memory": settings.device == "cuda",
        "train_sampling_strategy": "group_by_length" if "grouped" in variant else "sequential",
    }
    if variant != "shipped":
        given["gradient_checkpointing"] = case.recompute
    if "precomputed" in variant:
        given["precompute_ref_log_probs"] = True
    if "grouped" in variant or "bfd" in variant:  # batches of its own: all examples once, in as many steps as it takes
        given |= {"max_steps": -1, "num_train_epochs": 1}
    if "padding-free" in variant:
        given |= {"padding_free": True, "max_length": None}
    if "bfd" in variant:
        given |= {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": packs(rows, settings)}
    return given


def packs(rows: list[dict[str, Any]], settings: Settings) -> int:
    """Packs of `max_length` tokens that hold about as much as `batch_size` examples do."""
    tokens = sum(map(unique_tokens, rows)) / len(rows) * settings.batch_size
    return max(1, round(tokens / settings.max_length))


def model_of(case: Case, settings: Settings, scratch: Path, attention: str | None) -> tuple[Any, Any]:
    """Model and tokenizer."""
    folder = scratch / ("scalar" if case.stage == "rm" else "policy")
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if attention:
        options["attn_implementation"] = attention
    if case.stage == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, AutoTokenizer.from_pretrained(folder)


def examples_of(case: Case, batch: dict[str, Any]) -> list[list[list[int]]]:
    """The examples that a batch held, as `signature` writes them."""
    ids = batch["input_ids"]
    if case.stage == "sft" and "attention_mask" not in batch:
        borders = batch["cu_seq_lens_q"].tolist()
        parts = pairwise(borders)
        return [[[*ids[0, a:b].tolist(), int((batch["labels"][0, a:b] != -100).sum())]] for a, b in parts]
    mask = batch["attention_mask"].bool()
    if case.stage == "sft":
        trained = (batch["labels"] != -100).sum(-1).tolist()
    elif case.stage == "dpo":
        trained = batch["completion_mask"].sum(-1).tolist()
    else:
        trained = [0] * len(ids)
    sequences = [[*row[keep].tolist(), n] for row, keep, n in zip(ids, mask, trained, strict=True)]
    if case.stage == "sft":
        return [[sequence] for sequence in sequences]
    half = len(sequences) // 2
    return [[chosen, rejected] for chosen, rejected in zip(sequences[:half], sequences[half:], strict=True)]


def measure(case: Case, variant: str, scratch: Path, out: Path) -> None:
    """Trains the case's steps and writes what they cost."""
    settings = Settings.load(scratch / "settings.json")
    torch.set_num_threads(settings.threads)
    rows, attention = load_tokens(scratch), None
    if variant.endswith("+ours"):
        from benchmarks.peers.attention import NAME as attention
    model, tokenizer = model_of(case, settings, scratch, attention)
    trainer_class, config = {"sft": (SFT, SFTConfig), "dpo": (DPO, DPOConfig), "rm": (Reward, RewardConfig)}[case.stage]
    trainer_class.meter, trainer_class.batches = meter, batches = Meter(settings.device), []
    trainer = trainer_class(
        model,
        args=config(**arguments(case, variant, settings, rows, out)),
        train_dataset=dataset_of(case, rows),
        processing_class=tokenizer,
    )
    models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])]
    trainer.add_callback(Stamp(meter, *models))
    trainer.train()
    known = {digest([key_of(case, row)]): row for row in rows}
    seen = []
    for batch in batches:
        held = examples_of(case, batch)
        found = [known[digest([example])] for example in held]
        seen += found
        meter.steps.append(
            {"digest": digest(map(signature, found)), "tokens": sum(map(unique_tokens, found)), "examples": len(found)}
        )
    meter.save(out, examples=digest(map(signature, seen)), case=case.name, side="trl", variant=variant)


def key_of(case: Case, row: dict[str, Any]) -> list[list[int]]:
    """The row's signature as far as the trainer's batch shows it: a reward model's batch has no labels."""
    sequences = signature(row)
    return [[*sequence[:-1], 0] for sequence in sequences] if case.stage == "rm" else sequences


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    measure(CASES[sys.argv[1]], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
