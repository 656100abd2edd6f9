"""Trainers of lower precision: bf16-mixed with the optimizers that the configurations have, and what is refused."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lit_align.models.source import ModelSource
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT
from lit_align.stages.precision import clip_gradients


class Used(Callback):
    """A figure of the gradients that each optimizer step was made with."""

    def __init__(self, figure):
        self.figure, self.values = figure, []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.note)  # gradients are there until the next backward pass

    def note(self, optimizer, *_):
        used = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.values.append(float(self.figure(torch.cat(used).double())))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "stage, records",
    [(LitPretrain, "conversations"), (LitSFT, "conversations"), (LitReward, "pairs"), (LitDPO, "pairs")],
)
def test_the_default_optimizer_is_fused_and_its_gradients_are_clipped(
    stage, records, precision, request, tiny_model, make_data, make_trainer
):
    norms = Used(torch.linalg.vector_norm)
    trainer = make_trainer(max_steps=2, precision=precision, gradient_clip_val=1e-3, callbacks=[norms])
    trainer.fit(stage(ModelSource(path=str(tiny_model))), datamodule=make_data(request.getfixturevalue(records)))
    assert trainer.optimizers[0].defaults["fused"] and len(norms.values) == 2
    assert all(value == pytest.approx(1e-3, rel=1e-2) for value in norms.values)


def test_gradients_are_clipped_by_value_too(conversations, tiny_model, make_data, make_trainer):
    largest = Used(lambda gradients: gradients.abs().max())
    options = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value", "callbacks": [largest]}
    trainer = make_trainer(max_steps=1, precision="bf16-mixed", **options)
    trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=make_data(conversations))
    assert largest.values == [pytest.approx(1e-5)]


@pytest.mark.parametrize(
    "precision, dtype", [("bf16-true", "bfloat16"), ("16-true", "float16"), ("64-true", "float64")]
)
@pytest.mark.parametrize("stage", [LitSFT, LitPPO])
def test_a_trainer_that_casts_everything_is_refused(
    stage, precision, dtype, tiny_model, prompts, make_data, make_trainer
):
    source = ModelSource(path=str(tiny_model))
    module = stage(source, reward_model=source) if stage is LitPPO else stage(source)
    with pytest.raises(ValueError, match=f"got {precision}.*policy.dtype: {dtype}"):
        make_trainer(max_steps=1, precision=precision).fit(module, datamodule=make_data(prompts))


@pytest.mark.parametrize("clips", [0.0, 1.0])
def test_a_fused_optimizer_under_a_scaler_is_refused_before_the_first_step(
    clips, conversations, tiny_model, make_data, make_trainer, monkeypatch
):
    seen = []
    monkeypatch.setattr(LitSFT, "training_step", lambda *_: seen.append(1))
    plugin = MixedPrecision("16-mixed", "cpu")  # as a plugin: of a CPU's setting Lightning makes bf16-mixed
    trainer = make_trainer(max_steps=1, plugins=[plugin], gradient_clip_val=clips)
    with pytest.raises(ValueError, match=r"fused AdamW .*fused: false"):
        trainer.fit(LitSFT(ModelSource(path=str(tiny_model))), datamodule=make_data(conversations))
    assert not seen


def test_what_scales_gradients_clips_what_they_were_before(make_trainer):
    trainer = make_trainer(precision="bf16-mixed")
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    clip_gradients(trainer, torch.optim.AdamW([weight]), 0.5, None)
    assert float(weight.grad) == pytest.approx(0.5)
