"""Our side of PPO: `LitPPO` with its defaults, one Lightning epoch an iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from benchmarks.meter import Meter, digest
from benchmarks.ours import optimisation, source, trainer_of
from benchmarks.prepare import data_module
from benchmarks.settings import Case, Settings
from benchmarks.tokens import forced_answers, iterations, load_tokens
from lit_align import LitPPO
from lit_align.rollout.engines import Decode
from lit_align.rollout.estimators import GAE, Advantages
from lit_align.rollout.experience import Rollout
from lit_align.rollout.sampling import Answer, Sampling
from lit_align.stages.ppo_settings import PPOSettings

NEVER = -1
"""No token has this id, so no answer ends early."""


class FixedLength(LitPPO):
    """Answers of a fixed length, as its peer gives them; in a gate run the answers themselves are given too."""

    forced = False

    @property
    def stop_ids(self) -> list[int]:
        """None that could be sampled."""
        return [NEVER]

    def answers(
        self, prompt_ids: Sequence[Tensor], num_answers: int, *args: Any, **kwargs: Any
    ) -> list[tuple[Answer, ...]]:
        """As `LitPPO`'s, or the same tokens on both sides."""
        if not self.forced:
            return super().answers(prompt_ids, num_answers, *args, **kwargs)
        return [(answer,) for answer in self._given(prompt_ids)]

    def _given(self, prompt_ids: Sequence[Tensor]) -> list[Answer]:
        size = self.sampling.max_new_tokens
        rows = forced_answers([ids.tolist() for ids in prompt_ids], size, self.policy.config.vocab_size)
        # The forced run computes their log-probabilities itself.
        return [Answer(torch.tensor(ids), False, torch.zeros(size)) for ids in rows]


def sampler() -> Callable[[Any, list[Tensor], list[int], Sampling], Any]:
    """The project's sampling of one answer to each prompt: f(model, prompts, stop ids, sampling)."""
    return lambda model, prompts, stops, sampling: Decode()(model, prompts, 1, stops, sampling, None)


class UnbiasedGAE(GAE):
    """Whitened as the peer does, by the unbiased standard deviation: for the gate, whose gradients must be equal."""

    def __call__(self, rollout: Rollout, kl_coef: float) -> Advantages:
        """GAE's, times sqrt((n - 1) / n) for n sampled tokens."""
        found, count = super().__call__(rollout, kl_coef), float(rollout.response_mask.sum())
        return found._replace(advantages=found.advantages * ((count - 1) / count) ** 0.5)


class Iterations(Callback):
    """Stamps the end of every iteration; keeps the losses of its updates and the first gradient norm."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: Trainer, stage: Any) -> None:
        """All four networks are in memory."""
        self.meter.loaded(stage.policy, stage.critic, stage.reference, stage.reward_model)
        self.meter.stamp()

    def on_before_optimizer_step(self, trainer: Trainer, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        """The gradient norm of the first update."""
        if self.meter.grad_norm is None:
            grads = [p.grad for p in stage.parameters() if p.grad is not None]
            self.meter.grad_norm = float(torch.nn.utils.get_total_norm(grads))

    def on_train_batch_end(self, trainer: Trainer, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """An update has ended."""
        self.meter.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Trainer, stage: Any) -> None:
        """An iteration has ended."""
        self.meter.stamp()


def measure_ppo(case: Case, scratch: Path, out: Path, forced: bool) -> None:
    """Runs the case's iterations and writes what they cost."""
    settings = Settings.load(scratch / "settings.json")
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed, verbose=False)
    rows, scalar = load_tokens(scratch), source(scratch / "scalar", settings)
    stage = FixedLength(
        source(scratch / "policy", settings),
        reward_model=scalar,
        critic=scalar,
        estimator=UnbiasedGAE() if forced else GAE(),
        ppo=PPOSettings(
            ppo_epochs=settings.ppo_epochs,
            old_logps="recompute" if forced else "sampled",  # as the peer: of sampling, where there was any
            missing_eos_penalty=0.0,
            reward_clip=None,
            dual_clip=None,
        ),
        sampling=Sampling(max_new_tokens=settings.response_length),
        **optimisation(settings),
    )
    stage.forced = forced
    count = 1 if forced else settings.warmup + settings.steps
    meter, data = Meter(settings.device), data_module(case, settings, scratch)
    trainer = trainer_of(
        settings,
        Iterations(meter),
        max_steps=-1,
        max_epochs=count,
        gradient_clip_val=None,  # the peer does not clip
        log_every_n_steps=settings.ppo_epochs,  # once an iteration, as the peer does
        logger=CSVLogger(scratch, name="logs"),
    )
    trainer.fit(stage, data)
    meter.steps = iterations(rows, settings.batch_size, settings.response_length)[:count]
    meter.save(out, examples=digest([[row["prompt"]] for row in rows]), case=case.name, side="ours", variant="ours")
