"""How fast a run is, and how far from what its machine could do."""

from __future__ import annotations

from operator import add
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.batch import Work
from lit_align.callbacks.clock import Clock
from lit_align.callbacks.figures import (
    COUNT,
    COUNTS,
    PHASE,
    compute_dtype,
    figures,
    gpu_memory,
    host_memory,
    in_words,
    of_whole_run,
    over_all_ranks,
    short,
)
from lit_align.machine import Machine, this_machine
from lit_align.models.flops import Flops, state_bytes, update_bytes
from lit_align.models.tokens import first_line


class Meter(Callback):
    """Measures useful tokens per second, model FLOPs per second, and their share of the machine's floor.

    Logged as `perf/...` at logged steps, for the steps since the last one; as `tok/s` in the progress bar; for the
    whole run in `results.json` and in one line at its end. What each figure is divided by: docs/performance.md.

    Validation, checkpoints and the first steps do not count; after a resume what counts begins anew. Nothing is read
    from the device and no rank is asked but at logged steps (there the device is waited for, and ranks add up their
    work with one collective), at the end of epochs, before validation and before checkpoints.

    The work of a batch is its `work`. A module says what work costs in a method `step_flops()`, and which seconds of
    its loader are not waiting in `phase_seconds` ("rollout" among them, the seconds of sampling), and what is sampled
    in `rollout_counts` ("answers", "sampled_tokens"): dictionaries of numbers of this rank that grow. Without these
    the figures that need them are left out.

    Args:
        warmup_steps: Optimizer steps at the start that do not count.
        flops_per_second: Of one device in the run's data type; None = measured, once for each machine.
        bytes_per_second: Of a copy of one device's memory, read and written ones added; None = measured.
    """

    def __init__(
        self, warmup_steps: int = 1, flops_per_second: float | None = None, bytes_per_second: float | None = None
    ) -> None:
        super().__init__()
        given = [value for value in (flops_per_second, bytes_per_second) if value is not None]
        if warmup_steps < 0 or any(value <= 0 for value in given):
            raise ValueError(
                "Meter: expected warmup_steps >= 0 and rates above 0, got "
                f"{warmup_steps}, {flops_per_second}, {bytes_per_second}"
            )
        self.warmup_steps = warmup_steps
        self.flops_per_second, self.bytes_per_second = flops_per_second, bytes_per_second
        self.results: dict[str, float] = {}
        self._clock: Clock | None = None
        self._cost: Flops | None = None
        self._machine: Machine | None = None
        self._work, self._steps, self._step = Work(), 0, 0
        self._update_bytes: int | None = None
        # What was counted until warm-up was over, until the last logged step, and until the last step that is known.
        self._start: dict[str, float] | None = None
        self._logged: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns what the machine can do and what a step costs; starts the clock."""
        self._release()
        self.results, self._start, self._last, self._work = {}, None, {}, Work()
        self._steps, self._step, self._update_bytes = 0, trainer.global_step, None
        self._cost = _cost(pl_module)
        self._machine = None if self._cost is None else self._find_machine(trainer, pl_module)
        loop = trainer.fit_loop.epoch_loop
        clock = self._clock = Clock(lambda: _counters(pl_module), lambda: _wait_for(pl_module.device))
        clock.pause_during(loop.val_loop, "run")
        clock.pause_during(trainer, "save_checkpoint")
        clock.wait_between(loop, "_on_before_fetch", "_on_after_fetch")
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # what measuring took is not the run's
        if self.warmup_steps == 0:
            self._start = self._logged = self._count()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the micro-batch's work; logs if a step was made that is logged."""
        work = getattr(batch, "work", None)
        if work is not None:
            self._work = Work(*map(add, self._work, work))
        if trainer.global_step == self._step:
            return
        self._step, self._steps = trainer.global_step, self._steps + 1
        if self._start is None:
            if self._steps >= self.warmup_steps:
                _wait_for(pl_module.device)
                self._start = self._logged = self._count()
            return
        logged = trainer.log_every_n_steps > 0 and self._step % trainer.log_every_n_steps == 0
        if logged or trainer.is_last_batch or trainer.should_stop or self._step == trainer.max_steps:
            _wait_for(pl_module.device)
            self._last = self._count()
        if logged:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sums up the run, and says so in a line."""
        self._release()
        if self._start is None or not self._last:
            if trainer.is_global_zero:
                print(f"speed: not measured: the first steps ({self.warmup_steps}) are warm-up, and there were no more")
            return
        found = of_whole_run(self._figures(trainer, pl_module, self._start)) | host_memory()
        self.results = {f"perf/{name}": value for name, value in found.items()}
        if self._machine is not None:
            self.results["perf/machine_flops_per_second"] = self._machine.flops_per_second
            self.results["perf/machine_bytes_per_second"] = self._machine.bytes_per_second
        steps = int(self._last["steps"] - self._start["steps"])
        if trainer.is_global_zero:
            words = in_words(found, self._machine, _compute_dtype(trainer, pl_module))
            print(f"speed: {words} ({steps} steps; without warm-up, validation and checkpoints)")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the trainer."""
        self._release()

    def _release(self) -> None:
        if self._clock is not None:
            self._clock.release()

    def _find_machine(self, trainer: Trainer, pl_module: LightningModule) -> Machine:
        """What was given, else measured: by the first rank alone, for side by side they would slow each other down."""
        found = [self.flops_per_second, self.bytes_per_second]
        if None in found and trainer.is_global_zero:
            known = this_machine(pl_module.device, _compute_dtype(trainer, pl_module))
            found = [found[0] or known.flops_per_second, found[1] or known.bytes_per_second]
        return Machine(*trainer.strategy.broadcast(found))

    def _count(self) -> dict[str, float]:
        assert self._clock is not None
        return {"steps": self._steps, **self._work._asdict(), **self._clock.now()}

    def _figures(self, trainer: Trainer, pl_module: LightningModule, since: dict[str, float]) -> dict[str, float]:
        counted = {name: value - since.get(name, 0) for name, value in self._last.items()}
        counted = over_all_ranks(counted, pl_module.device)
        if self._update_bytes is None:  # the same at every step, once the optimizer has its state
            self._update_bytes = sum(_moved(optimizer) for optimizer in trainer.optimizers)
        found = figures(counted, self._cost, self._machine, self._update_bytes, trainer.world_size)
        return found | gpu_memory(pl_module.device)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self._figures(trainer, pl_module, self._logged)
        self._logged = self._last
        # Not by `self.log`: Lightning would go through all of these names at every micro-batch of the epoch.
        for logger in trainer.loggers:
            logger.log_metrics({f"perf/{name}": value for name, value in found.items()}, step=self._step - 1)
        if "tokens_per_second" in found and trainer.progress_bar_callback is not None:
            trainer.progress_bar_metrics["tok/s"] = short(found["tokens_per_second"])  # type: ignore[assignment]


def _cost(pl_module: LightningModule) -> Flops | None:
    """What a step costs; None where the module does not say so, or cannot: a meter ends no run."""
    step_flops = getattr(pl_module, "step_flops", None)
    try:
        return None if step_flops is None else step_flops()
    except Exception as error:  # whatever a configuration of a new kind brings about
        rank_zero_warn(f"model FLOPs are left out, as they cannot be told: {first_line(error)}")
        return None


def _counters(pl_module: LightningModule) -> dict[str, float]:
    """The stage's own phases and counts; the same counts on every rank, whether it has sampled yet or not."""
    phases, counts = getattr(pl_module, "phase_seconds", {}), getattr(pl_module, "rollout_counts", None)
    named = {} if counts is None else {COUNT + name: float(counts.get(name, 0)) for name in COUNTS}
    return {PHASE + name: spent for name, spent in phases.items()} | named


def _moved(optimizer: Any) -> int:
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return update_bytes(parameters, state_bytes(optimizer))


def _compute_dtype(trainer: Trainer, pl_module: LightningModule) -> torch.dtype:
    return compute_dtype(str(trainer.precision), pl_module.parameters())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
