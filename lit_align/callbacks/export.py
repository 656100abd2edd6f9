"""The trained model as a Hugging Face folder, where the next stage finds its start."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.hosts import failing_together
from lit_align.models.checkpoint import whole_copy
from lit_align.models.folder import place_for
from lit_align.models.sharding import is_sharded
from lit_align.runs import EXPORT


class ExportHF(Callback):
    """Writes the stage's main network and its tokenizer to `hf/` in the run folder when training ends.

    The main network is the first that the stage's `trained` names; a module without it is left alone.

    Args:
        merge_lora: Write whole weights with the adapters folded in; false writes the adapters alone.
    """

    def __init__(self, merge_lora: bool = True) -> None:
        super().__init__()
        self.merge_lora = merge_lora

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a folder that could not be replaced at the end, before anything is trained."""
        if _main_network(pl_module) is None or trainer.fast_dev_run:
            return
        with failing_together(trainer):
            if trainer.is_global_zero:
                place_for(_folder(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder; if that fails, all ranks do."""
        role = _main_network(pl_module)
        if role is None or trainer.fast_dev_run:
            return
        from lit_align.models.export import export_module

        with failing_together(trainer):
            module = getattr(pl_module, role)
            if is_sharded(module):  # all ranks give their parts
                module = whole_copy(*pl_module.roles()[role])
            if trainer.is_global_zero:
                export_module(module, pl_module.tokenizer, _folder(trainer), self.merge_lora)


def _main_network(pl_module: LightningModule) -> str | None:
    return next(iter(getattr(pl_module, "trained", ())), None)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / EXPORT
