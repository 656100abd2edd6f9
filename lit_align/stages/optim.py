"""Learning-rate schedules, chosen by class path; each takes (optimizer, total_steps) and its own settings."""

from __future__ import annotations

import math

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def optimizer_settings(optimizer: Optimizer) -> dict[str, str]:
    """The optimizer's class and what it was built with, by name, and each group's own; before a schedule changes it."""
    settings = {"class": type(optimizer).__name__, **{k: str(v) for k, v in optimizer.defaults.items()}}
    for number, group in enumerate(optimizer.param_groups):
        own = {k: group[k] for k, v in optimizer.defaults.items() if group[k] != v}
        settings |= {f"{k} of group {number}": str(v) for k, v in own.items()}
    return settings


def takes_shards(optimizer: Optimizer) -> bool:
    """Whether an optimizer can work on sharded weights: bitsandbytes' kernels take whole tensors alone."""
    return not type(optimizer).__module__.startswith("bitsandbytes")


def check_takes_shards(optimizer: Optimizer, sharded: bool | None = None) -> None:
    """Refuses an optimizer that cannot work on sharded weights.

    Args:
        optimizer: As built.
        sharded: Whether its weights will be sharded; None = as they are.

    Raises:
        ValueError: It is one of bitsandbytes', and they are.
    """
    if sharded is None:
        sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if sharded and not takes_shards(optimizer):
        raise ValueError(
            f"optimizer: bitsandbytes' {type(optimizer).__name__} cannot work on sharded weights (strategy fsdp2); use "
            "torch.optim.AdamW, whose states are sharded too, or one device or strategy ddp"
        )


class WarmupConstant(LambdaLR):
    """Linear warm-up from 0, then the optimizer's own rate.

    Args:
        optimizer: Whose learning rates are scheduled.
        total_steps: Optimizer steps of the run.
        warmup_ratio: Share of `total_steps` spent on warming up, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.03) -> None:
        warmup = _warmup_steps(total_steps, warmup_ratio)
        super().__init__(optimizer, lambda step: _ramp(step, warmup))


class WarmupLinear(LambdaLR):
    """Linear warm-up from 0, then linear decay.

    Args:
        optimizer: Whose learning rates are scheduled.
        total_steps: Optimizer steps of the run; the rate is `final_ratio` of the peak after the last one.
        warmup_ratio: Share of `total_steps` spent on warming up, in [0, 1].
        final_ratio: Share of the peak rate that is left at the end.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.03, final_ratio: float = 0.0
    ) -> None:
        warmup = _warmup_steps(total_steps, warmup_ratio)

        def factor(step: int) -> float:
            return _ramp(step, warmup) * (1 - (1 - final_ratio) * _progress(step, warmup, total_steps))

        super().__init__(optimizer, factor)


class WarmupCosine(LambdaLR):
    """Linear warm-up from 0, then half a cosine (SGDR without restarts, arXiv:1608.03983, eq. 5).

    Args:
        optimizer: Whose learning rates are scheduled.
        total_steps: Optimizer steps of the run; the rate is `final_ratio` of the peak after the last one.
        warmup_ratio: Share of `total_steps` spent on warming up, in [0, 1].
        final_ratio: Share of the peak rate that is left at the end.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.03, final_ratio: float = 0.1
    ) -> None:
        warmup = _warmup_steps(total_steps, warmup_ratio)

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, total_steps)))
            return _ramp(step, warmup) * (final_ratio + (1 - final_ratio) * cosine)

        super().__init__(optimizer, factor)


def _warmup_steps(total_steps: int, ratio: float) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"warmup_ratio: expected a share in [0, 1], got {ratio}")
    return math.ceil(total_steps * ratio)


def _ramp(step: int, warmup: int) -> float:
    # The first step already moves: (step + 1) rather than step.
    return min(1.0, (step + 1) / (warmup + 1))


def _progress(step: int, warmup: int, total: int) -> float:
    return min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
