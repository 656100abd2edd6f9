"""A reference that is not in memory: its log-probabilities of the data are made at the start of training, or read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_align.batch import Example, MicroBatch
from lit_align.models.fingerprint import fingerprint
from lit_align.models.modes import evaluating, has_adapters
from lit_align.models.reference import make_reference, reference_mode
from lit_align.models.reference_cache import (
    cache_folder,
    cache_key,
    describe_machine,
    describe_network,
    examples_digest,
    sequence_logps,
)
from lit_align.models.source import ModelSource
from lit_align.stages.reference_tables import fixed_loaders, obtain


class CachedReference:
    """The reference of a policy as a table of what it says of every training and validation example.

    Args:
        cache: Folder of the files; True = the folder where tokenised data is kept.
        policy_source: Where the policy comes from.
        reference_source: Where the reference comes from; None = where the policy comes from.

    Raises:
        ValueError: The reference starts from scratch: it could not be built a second time.
    """

    def __init__(
        self, cache: bool | str, policy_source: ModelSource, reference_source: ModelSource | None = None
    ) -> None:
        if (reference_source or policy_source).config is not None:
            raise ValueError(
                "reference_cache: a network that starts from scratch lives nowhere to be read again when its "
                "log-probabilities are checked; leave reference_cache out, or give a path"
            )
        self.cache, self.policy_source, self.reference_source = cache, policy_source, reference_source
        self._network: dict[str, Any] = {}
        self._loaded: nn.Module | None = None
        self._tables: list[tuple[str, Sequence[Example], Tensor]] = []

    def anchor(self, policy: nn.Module, reference: nn.Module | None = None) -> None:
        """Notes once what the reference is.

        Args:
            policy: As it was built just now, with the weights of its start; not looked at if there is a reference.
            reference: The network itself if it is in memory already.
        """
        if self._network:
            return
        if reference is None and self.reference_source is not None:
            # Its weights have to be seen to be known; kept until training starts, where they may be needed.
            reference = self._loaded = make_reference(policy, self.policy_source, self.reference_source)
        self._network = describe_network(policy if reference is None else reference)

    def fingerprints(self, policy: nn.Module) -> dict[str, str]:
        """What a checkpoint would say of the reference if it were a network of its own."""
        own = self.reference_source is not None or not has_adapters(policy)
        return {"reference": self._network["fingerprint"]} if own and self._network else {}

    def check(self, reference: nn.Module | None) -> None:
        """Refuses a network that is not the one that was anchored.

        Raises:
            ValueError: The files that it was loaded from have changed since.
        """
        if reference is None or not self._network:
            return
        if (found := fingerprint(reference)) != self._network["fingerprint"]:
            raise ValueError(
                f"reference: its files have changed since the run began (fingerprint {found[:12]}, expected "
                f"{self._network['fingerprint'][:12]}); restore them"
            )

    def prepare(self, stage: LightningModule) -> None:
        """Reads the tables, or computes and writes them; every rank has to call it. No reference is held afterwards.

        Args:
            stage: With `policy` and `reference`, on its device, inside `trainer.fit`.

        Raises:
            ValueError: The data has no fixed examples, or a table is not what the reference says.
        """
        trainer, self._tables = stage.trainer, []
        loaders = fixed_loaders(trainer)
        with (
            isolate_rng(),
            torch.no_grad(),
            self._reference(stage) as network,
            trainer.precision_plugin.forward_context(),
        ):
            for split, loader in loaders.items():
                examples = loader.dataset.examples
                digest = examples_digest(examples)
                path = self._folder(trainer) / f"{self._key(digest, trainer)}.safetensors"
                self._tables.append((digest, examples, obtain(path, split, loader, network, trainer)))
        stage.reference = self._loaded = None
        if not has_adapters(stage.policy):
            rank_zero_info(
                "reference: not in memory from here on, so the KL of freshly sampled answers is not measured"
            )

    def logps(self, trainer: Trainer, batch: MicroBatch) -> Tensor:
        """The reference's log-probability of each sequence, in nats, float64 [S] (float32 on MPS).

        Raises:
            ValueError: The trainer loads examples that no table is of.
        """
        loader = trainer.train_dataloader if trainer.training else trainer.val_dataloaders
        return sequence_logps(self._table_of(loader.dataset.examples), batch)

    def _table_of(self, examples: Sequence[Example]) -> Tensor:
        for _, known, table in self._tables:
            if known is examples:
                return table
        digest = examples_digest(examples)  # a loader that was asked for anew may hold the same once more
        for known_digest, _, table in self._tables:
            if known_digest == digest:
                self._tables.append((digest, examples, table))
                return table
        raise ValueError(
            "reference_cache: the data is not what it was when training started (were loaders exchanged?), and the "
            "reference is not in memory any more; keep the data, or leave reference_cache out"
        )

    @contextmanager
    def _reference(self, stage: LightningModule) -> Iterator[nn.Module]:
        """The network itself: in memory already, or the policy where it is (still) the same; else it is loaded."""
        policy, network = stage.policy, stage.reference if self._loaded is None else self._loaded
        if network is None and self.reference_source is None and has_adapters(policy):
            with reference_mode(policy):
                yield policy
        elif network is None and self.reference_source is None and self._is_anchored(policy):
            with evaluating(policy):
                yield policy
        else:
            if network is None:  # a resumed policy is no reference
                network = make_reference(policy, self.policy_source, self.reference_source)
                self.check(network)
            yield stage.trainer.precision_plugin.convert_module(network).to(stage.device)

    def _is_anchored(self, policy: nn.Module) -> bool:
        return fingerprint(policy) == self._network["fingerprint"]

    def _key(self, digest: str, trainer: Trainer) -> str:
        machine = describe_machine(trainer.strategy.root_device)
        return cache_key(network=self._network, examples=digest, precision=trainer.precision, machine=machine)

    def _folder(self, trainer: Trainer) -> Path:
        if self.cache is not True:
            return Path(self.cache).expanduser()
        return cache_folder(getattr(getattr(trainer, "datamodule", None), "cache_dir", None))


def cached_reference(
    cache: bool | str, policy: ModelSource, reference: ModelSource | None, reference_free: bool
) -> CachedReference | None:
    """What a stage's option `reference_cache` asks for; None = the reference stays in memory.

    Raises:
        ValueError: There is nothing to keep.
    """
    if not cache:
        return None
    if reference_free:
        raise ValueError("reference_cache: this loss looks at no reference; leave reference_cache out")
    return CachedReference(cache, policy, reference)
