"""What trainers of lower precision do to a stage: which are taken, and clipping under bf16-mixed."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch.optim import Optimizer

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SHORT = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
"""Other ways to write a trainer's precision."""


def precision_name(setting: object) -> str:
    """The whole name of a trainer's `precision`."""
    return SHORT.get(str(setting), str(setting))


def check_precision(precision: str) -> None:
    """Refuses trainers that cast everything: scalar heads, weights of examples and means stay in float32.

    Raises:
        ValueError: With what to set instead.
    """
    if precision not in PRECISIONS:
        dtype = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}.get(precision, "bfloat16")
        raise ValueError(
            f"trainer.precision: expected one of {', '.join(PRECISIONS)}; got {precision}. It would cast scalar heads, "
            f"weights of examples and means too; set the network's own dtype (policy.dtype: {dtype}) and leave "
            "precision out"
        )


def check_unscaled(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuses a fused optimizer where gradients are scaled: it takes that back after they are clipped and logged.

    Raises:
        ValueError: With what to set instead.
    """
    plugin = trainer.precision_plugin
    scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"trainer.precision {plugin.precision} scales gradients, and a fused {type(optimizer).__name__} takes that "
            "back itself, after they are clipped; set optimizer.init_args.fused: false, or precision: bf16-mixed"
        )


def clip_gradients(trainer: Trainer, optimizer: Optimizer, most: float | None, algorithm: str | None) -> None:
    """Clips as the trainer says, fused optimizers under bf16-mixed too.

    Lightning refuses those, for they undo the scaling of gradients themselves; in bfloat16 nothing is scaled.

    Args:
        trainer: Whose precision counts.
        optimizer: Its parameters' gradients are clipped in place; see `check_unscaled`.
        most: Largest norm, or largest magnitude; None or 0 = as they are.
        algorithm: "norm" or "value"; None = "norm".
    """
    plugin, kind = trainer.precision_plugin, GradClipAlgorithmType(algorithm or "norm")
    if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        Precision.clip_gradients(plugin, optimizer, most or 0.0, kind)
    else:
        plugin.clip_gradients(optimizer, most or 0.0, kind)
