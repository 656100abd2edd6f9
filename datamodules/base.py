"""What the four data modules share: sources, tokenizer, cache, held-out data, loaders with an exact cursor."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from datamodules.arguments import at_least, check_batch, held_out_fraction, one_of, too_long_for_a_step
from datamodules.examples import Collate, Examples, Layout
from datamodules.formats import resolve
from datamodules.identity import check_same, identity_of
from datamodules.inspection import Inspection
from datamodules.mixtures import mixture_note, mixture_weights
from datamodules.overlong import Overlong
from datamodules.report import DataReport, SplitReport
from datamodules.rows import Rows
from datamodules.splitting import hold_out
from datamodules.store import Encoder, OnError, Tokenised, tokenise
from datamodules.streaming import check_streaming, open_stream, stream_loader
from lit_align.batch import PlannedLoader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceSpec = dict[str, Any] | list[Any] | str | None
SPLITS = ("train", "validation", "test", "predict")


class AlignDataModule(Inspection, LightningDataModule):
    """Reads, checks and tokenises data, and loads it by the step plan.

    Args:
        train: Where the training data is: a file (txt, json, jsonl, parquet), a folder, a glob, the id of a
            `datasets` dataset, an object {"path", "name", "split", "revision", "data_files"} as
            `datasets.load_dataset` takes them, or a list of these. In a mixture an object has a "weight" too: how
            often an epoch sees each of the source's examples. 2 = twice; 0.5 = a half of them, another half drawn
            from (seed, epoch) in every epoch; 1.5 = all of them, and a half once more.
        validation: The same for held-out data, or a fraction between 0 and 1 to split off the training data by
            prompt, so that no prompt is on both sides.
        test: The same for `test`.
        predict: The same for `predict`.
        tokenizer: Folder, id (`org/name`, `org/name@revision`) or GGUF file; the command line fills in the model's.
        batch_size: Examples of an optimizer step, over all ranks and micro-batches together: `devices` and
            `accumulate_grad_batches` split this number, they do not multiply it. Default: 8, or `max_tokens`.
        max_tokens: Instead of `batch_size`: unique tokens of an optimizer step, over all ranks and micro-batches
            together; a step holds as many examples as fit, and at least one.
        eval_batch_size: Examples of a step in validation, test and predict, over all ranks; default: as in training.
        max_length: Token budget of an example (prompt and response together).
        on_error: Faulty records: "raise" = stop and name them with file, line and field; "skip" = leave them out,
            counted by reason in the report.
        overlong: Examples above `max_length`: "raise" = stop; "drop" = leave them out; "truncate" = keep the end of
            the prompt and the start of the response. Counted in the report.
        seed: Of the order of examples and of the held-out fraction.
        num_workers: Processes that prepare micro-batches while the model trains; 0 = the training process itself.
        num_proc: Processes that tokenise.
        layout: "packed" = one row without padding, prefixes shared; "padded" = a rectangle with one row a sequence.
        padding_side: Side of the padding of the padded layout, "right" or "left".
        cache_dir: Where tokenised data is kept; default $LIT_ALIGN_CACHE, else ~/.cache/lit_align.
        streaming: Read and tokenise the training data window by window while the model trains, and keep nothing of
            it; it needs `trainer.max_steps`. Not for prompts, mixtures or a held-out fraction.
        stream_window: Raw records of a window; records are shuffled inside it alone.

    Attributes:
        report: What became of the records, split by split; filled by `setup`.
        datasets: The examples, split by split; filled by `setup`.
    """

    def __init__(
        self,
        train: SourceSpec = None,
        validation: float | SourceSpec = None,
        test: SourceSpec = None,
        predict: SourceSpec = None,
        tokenizer: str | None = None,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        on_error: OnError = "raise",
        overlong: Overlong = "raise",
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        layout: Layout = "packed",
        padding_side: Literal["left", "right"] = "right",
        cache_dir: str | None = None,
        streaming: bool = False,
        stream_window: int = 10_000,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self._held_out = held_out_fraction(validation)
        check_batch(batch_size, max_tokens, eval_batch_size)
        check_streaming(streaming, stream_window, self._held_out)
        self.streaming, self.stream_window = streaming, stream_window
        at_least("max_length", max_length, 2)
        one_of("on_error", on_error, ("raise", "skip"))
        one_of("overlong", overlong, ("raise", "drop", "truncate"))
        one_of("layout", layout, ("packed", "padded"))
        one_of("padding_side", padding_side, ("left", "right"))
        self.batch_size = 8 if batch_size is None and max_tokens is None else batch_size
        self.max_tokens, self.eval_batch_size = max_tokens, eval_batch_size
        self.max_length, self.on_error, self.overlong = max_length, on_error, overlong
        self.seed, self.num_workers, self.num_proc, self.cache_dir = seed, num_workers, num_proc, cache_dir
        self.layout, self.padding_side = layout, padding_side
        self._tokenizer_source: Any = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._prepared: dict[str, Tokenised] = {}
        self._identity: dict[str, str] = {}
        self._train_loader: Any = None
        self._cursor: dict[str, Any] = {}
        self.report = DataReport()
        self.datasets: dict[str, Examples] = {}

    def encoder(self) -> Encoder:
        """What makes rows from records; each data module has its own."""
        raise NotImplementedError

    def examples(self, rows: Rows, chosen: np.ndarray) -> Examples:
        """The examples in the chosen rows."""
        raise NotImplementedError

    def collate(self) -> Any:
        """What makes a batch from examples and their plan."""
        token = self.tokenizer.pad_token_id
        return Collate(self.layout, self.padding_side, token if token is not None else 0)

    def split(self, rows: Rows, fraction: float) -> tuple[Examples, Examples, str]:
        """Training and held-out examples, and in words how they were split."""
        held_out = hold_out(rows.numbers("key"), fraction, self.seed)
        note = f"{fraction:g} of the prompts of the training data, chosen with seed {self.seed}"
        return self.examples(rows, np.flatnonzero(~held_out)), self.examples(rows, np.flatnonzero(held_out)), note

    def warnings(self) -> list[str]:
        """What a user should know about the data that was set up: prompts that training and held-out data share."""
        if self._held_out is not None or "train" not in self.datasets:
            return []
        train, texts = self.datasets["train"].rows.numbers("key"), []
        for split in ("validation", "test"):
            if split in self.datasets:
                shared = len(np.intersect1d(train, self.datasets[split].rows.numbers("key")))
                texts += [f"{shared} prompts of the {split} data stand in the training data too"] * (shared > 0)
        return texts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use; with a ChatML template if it has none."""
        if self._tokenizer is None:
            from datamodules.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer_source, type(self).__name__)
        return self._tokenizer

    def prepare_data(self) -> None:
        """Tokenises what is not in the cache yet; Lightning calls it on one process of a node."""
        trainer = self.trainer
        stage = trainer.state.fn.value if trainer is not None and trainer.state.fn is not None else None
        splits = [split for split in self._needed(stage) if not (self.streaming and split == "train")]
        self._prepared = {split: self._tokenise(split) for split in splits}

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised data, splits off held-out data and reports what became of the records."""
        self.report, self.datasets = DataReport(), {}
        if getattr(stage, "value", stage) in (None, "fit"):  # what validates keeps the place of the training data
            self._train_loader, self._cursor, self._identity = None, {}, {}
        for split in self._needed(stage):
            if self.streaming and split == "train":
                self.report.splits[split], parts = open_stream(self)
                self._identity = identity_of(parts, self.plan_settings())
                continue
            done = self._prepared.pop(split, None) or self._tokenise(split)
            done.rows.weights = mixture_weights(resolve(self.sources[split]), split)
            if split == "train":
                self._identity = identity_of(done.parts, {**self.plan_settings(), "weights": done.rows.weights})
            if split == "train" and self._held_out is not None:
                train, held_out, note = self.split(done.rows, self._held_out)
                self._add("train", train, done.report)
                self._add("validation", held_out, SplitReport(cached=done.report.cached, note=note))
            else:
                self._add(split, self.examples(done.rows, np.arange(len(done.rows))), done.report)
        self.report.warnings = self.warnings() + too_long_for_a_step(self.max_tokens, self.datasets.get("train"))
        rank_zero_info(str(self.report))

    def plan_settings(self) -> dict[str, Any]:
        """What, besides the examples, decides which of them each optimizer step holds."""
        names = ("batch_size", "max_tokens", "seed")
        return {**{name: getattr(self, name) for name in names}, "validation": self._held_out}

    def identity(self) -> dict[str, str]:
        """Everything that the training examples and their order depend on, by name (data, tokenizer, settings)."""
        return dict(self._identity)

    def train_dataloader(self) -> Iterable:
        """Micro-batches of this rank in the order of the step plan, from the cursor on."""
        loader = self.train_loader()
        if self._train_loader is not None:  # the trainer asks for a new one in every epoch
            self._cursor = self._train_loader.state_dict()
        if self._cursor:
            loader.load_state_dict(self._cursor)
        self._train_loader = loader
        return loader

    def train_loader(self) -> Any:
        """What is iterated to train, with `state_dict` and `load_state_dict` for its cursor."""
        return stream_loader(self) if self.streaming else self.loader("train", shuffle=True)

    def val_dataloader(self) -> Iterable:
        """Validation batches in file order; nothing if there is no validation data."""
        if "validation" in self.datasets:
            return self.loader("validation")
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # it is our intention
        return []

    def test_dataloader(self) -> Iterable:
        """Test batches in file order."""
        return self.loader("test")

    def predict_dataloader(self) -> Iterable:
        """Batches to predict, in file order."""
        return self.loader("predict")

    def loader(self, split: str, *, shuffle: bool = False) -> PlannedLoader:
        """A loader of one split for this rank; only "train" accumulates micro-batches."""
        if split not in self.datasets:
            raise ValueError(f"{type(self).__name__}: no {split} data; give data.{split} = a file, a folder or an id")
        trainer, dataset = self.trainer, self.datasets[split]
        return PlannedLoader(
            dataset,
            self.collate(),
            lengths=dataset.lengths,
            trained_weights=dataset.trained_weights,
            **self._step_size(split),
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            micro_batches=self.micro_batches() if split == "train" else 1,
            shuffle=shuffle,
            seed=self.seed,
            copies=dataset.copies if split == "train" else None,
            num_workers=self.num_workers,
        )

    def micro_batches(self) -> int:
        """Micro-batches that a rank accumulates for a training step."""
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def state_dict(self) -> dict[str, Any]:
        """The cursor of the training data, and what it is a cursor of."""
        cursor = self._cursor if self._train_loader is None else self._train_loader.state_dict()
        return {"cursor": dict(cursor), "identity": self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts the cursor back, in the loader too if it is there already (some strategies restore late).

        Raises:
            ValueError: The data, the tokenizer or a setting of the plan is not what the run began with.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":  # nothing is resumed
            return
        check_same(state_dict["identity"], self.identity())
        self._cursor = dict(state_dict["cursor"])
        if self._train_loader is not None and self._cursor:
            self._train_loader.load_state_dict(self._cursor)

    def _step_size(self, split: str) -> dict[str, int | None]:
        if split != "train" and self.eval_batch_size is not None:
            return {"batch_size": self.eval_batch_size}
        return {"batch_size": self.batch_size, "max_tokens": self.max_tokens}

    def _needed(self, stage: str | None) -> list[str]:
        """The sources to read for a stage; held-out data comes with the training data."""
        stage = getattr(stage, "value", stage)  # Lightning hands over an enumeration
        wanted = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        splits = wanted.get(stage or "", SPLITS if stage is None else (stage,))
        if self._held_out is not None and "validation" in splits:
            splits = tuple(dict.fromkeys("train" if split == "validation" else split for split in splits))
        if stage == "fit" and self.sources["train"] is None:
            raise ValueError(f"{type(self).__name__}: no training data; give data.train = a file, a folder or an id")
        return [split for split in splits if self.sources[split] is not None]

    def _tokenise(self, split: str) -> Tokenised:
        return tokenise(
            resolve(self.sources[split]),
            self.encoder(),
            self.tokenizer,
            on_error=self.on_error,
            cache_dir=self.cache_dir,
            num_proc=self.num_proc,
            name=split,
        )

    def _add(self, split: str, examples: Examples, report: SplitReport) -> None:
        report.examples, report.tokens = len(examples), int(examples.lengths.sum())
        report.trained = float(examples.trained_weights.sum())
        report.note = mixture_note(examples.copies) if split == "train" else report.note
        self.datasets[split], self.report.splits[split] = examples, report
