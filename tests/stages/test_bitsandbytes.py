"""The 8-bit and paged optimizers of bitsandbytes, on a CPU: they train, and a resumed run is the uninterrupted one."""

import bitsandbytes
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable

from lit_align.callbacks.random_state import RandomState
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.stages import LitDPO, LitSFT

OPTIMIZERS = ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit")


def optimizer_from_yaml(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    init_args = {"lr": 1.0e-3, "weight_decay": 0.01}
    given = {"class_path": f"bitsandbytes.optim.{name}", "init_args": init_args}
    return parser.instantiate(parser.parse_object({"optimizer": given})).optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [LitSFT, LitDPO], ids=lambda kind: kind.__name__)
def test_a_resumed_run_is_the_uninterrupted_one(kind, name, tiny_model, request, make_data, make_trainer, tmp_path):
    items = request.getfixturevalue("pairs" if kind is LitDPO else "conversations")

    def run(checkpoint=None, **options):
        torch.manual_seed(0)
        stage = kind(ModelSource(path=str(tiny_model)), optimizer=optimizer_from_yaml(name))
        make_trainer(max_epochs=2, **options).fit(stage, datamodule=make_data(items), ckpt_path=checkpoint)
        return stage

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run(enable_checkpointing=True, callbacks=[RandomState(), saver])
    assert isinstance(whole.trainer.optimizers[0], getattr(bitsandbytes.optim, name))
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    kinds = {value.dtype for state in saved["optimizer_states"][0]["state"].values() for value in _tensors(state)}
    assert (torch.uint8 in kinds) == name.endswith("8bit")  # moments of large matrices are bytes
    start = kind(ModelSource(path=str(tiny_model)))
    start.configure_model()
    assert any(not torch.equal(v, whole.policy.state_dict()[k]) for k, v in start.policy.state_dict().items())
    for step in (1, 2, 4):
        resumed = run(str(tmp_path / f"step={step}.ckpt"), callbacks=[RandomState()])
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), (step, key)


def _tensors(state):
    """Tensors of a parameter's state; bitsandbytes keeps what may not be cast in a dictionary of its own."""
    for value in state.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def stepped(optimizer, parameter, steps=3):
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()
    return parameter.detach()


def test_a_paged_optimizer_makes_the_steps_of_adamw():
    """Large enough to be paged where there are pages; on a CPU bitsandbytes says that there are none."""
    start = torch.randn(400, 400)
    plain, paged = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    want = stepped(torch.optim.AdamW([plain], lr=1.0e-3, weight_decay=0.01), plain)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        got = stepped(optimizer_from_yaml("PagedAdamW32bit")([paged]), paged)
    assert torch.allclose(got, want, rtol=0, atol=1e-6) and not torch.allclose(got, start, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW32bit"])
def test_moments_of_large_weights_are_paged(name):
    start = torch.randn(400, 400)
    plain, paged = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.cuda())
    optimizer = optimizer_from_yaml(name)([paged])
    got = stepped(optimizer, paged).cpu()
    assert getattr(optimizer.state[paged]["state1"], "is_paged", False)
    want = stepped(torch.optim.AdamW([plain], lr=1.0e-3, weight_decay=0.01), plain)
    assert torch.allclose(got, want, rtol=0, atol=1e-6 if name.endswith("32bit") else 1e-3)


def test_adapters_on_a_base_in_few_bits_have_moments_in_8(tiny_model, conversations, make_data, make_trainer):
    source = ModelSource(path=str(tiny_model), quantization="nf4", lora=LoraSettings(r=128))
    stage = LitSFT(source, optimizer=optimizer_from_yaml("AdamW8bit"))
    trainer = make_trainer(max_steps=2)
    trainer.fit(stage, datamodule=make_data(conversations))
    optimizer = trainer.optimizers[0]
    large = [p for group in optimizer.param_groups for p in group["params"] if p.numel() >= 4096]
    assert large and {optimizer.state[p]["state1"].dtype for p in large} == {torch.uint8}
    assert all(float(optimizer.state[p]["absmax2"].max()) > 0 for p in large)
