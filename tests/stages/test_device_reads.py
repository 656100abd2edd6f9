"""Between logged steps nothing is read back from the device: a read would make the host wait for all queued work.

On a CPU nothing tells a read from a copy, so what would be one on a GPU is counted: operators that give a number to
Python or whose result has a size that only the data knows, and tensors that are asked for on the CPU.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from lightning.pytorch import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_align.callbacks import Meter
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitDPO, LitPPO, LitPretrain, LitReward, LitSFT, PPOSettings

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.histc.default,
}
OTHERS = ("transformers/masking_utils.py",)
"""Whose reads are known: transformers asks of a padded batch's mask whether it is full. Packed batches have none."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
METHODS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__}


def reads(function, args):
    """Whether a GPU would have to finish its work before this operator returns."""
    if function in INDEXING:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if function is aten.repeat_interleave.Tensor:
        return True
    return function in READS


def note(found, function):
    where = "".join(traceback.format_stack(limit=20)[:-2])
    found.append((str(function), where))


class Operators(TorchDispatchMode):
    """Notes operators that read; backward passes and the optimizer too."""

    def __init__(self, found, harmless):
        super().__init__()
        self.found, self.harmless = found, harmless

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if reads(function, args) and not self.harmless(args[0]):
            note(self.found, function)
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes tensors that are brought to the host: on a CPU these do nothing that the dispatcher sees."""

    def __init__(self, found, harmless):
        super().__init__()
        self.found, self.harmless = found, harmless

    def __torch_function__(self, function, types, args=(), kwargs=None):
        names = [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, str)]
        to_host = function is torch.Tensor.to and "cpu" in names
        if (function in METHODS or to_host) and not self.harmless(args[0]):
            note(self.found, function)
        return function(*args, **(kwargs or {}))


class Watch(Callback):
    """Watches each micro-batch from its start to its end, other callbacks' hooks included."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, list] = {}
        self.modes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        def counts_steps(tensor):
            # Optimizers keep this count on the CPU, on every device.
            return any(state.get("step") is tensor for o in trainer.optimizers for state in o.state.values())

        found = self.found.setdefault(trainer.global_step + 1, [])
        self.modes = [kind(found, counts_steps) for kind in (Operators, Methods)]
        for mode in self.modes:
            mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def even_tokens(prompts, answers, records):
    return [sum(ord(c) % 2 == 0 for c in a) / max(len(a), 1) for a in answers]


def stage(name, model, lora):
    source = ModelSource(path=str(model), lora=LoraSettings(r=4) if lora else None)
    if name != "ppo":
        return {"pt": LitPretrain, "sft": LitSFT, "rm": LitReward, "dpo": LitDPO}[name](source)
    return LitPPO(
        source,
        reward_functions=[RewardFunction(even_tokens)],
        ppo=PPOSettings(ppo_epochs=4, num_answers=2, kl_loss_coef=0.1, entropy_coef=0.01),
        sampling=Sampling(max_new_tokens=6),
    )


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["pt", "sft", "rm", "dpo", "ppo"])
def test_nothing_is_read_between_logged_steps(name, lora, layout, tiny_model, request, make_data, make_trainer):
    fixtures = {"pt": "conversations", "sft": "conversations", "ppo": "prompts"}
    examples = request.getfixturevalue(fixtures.get(name, "pairs"))
    watch = Watch()
    meter = Meter(flops_per_second=1e9, bytes_per_second=1e9)
    trainer = make_trainer(max_steps=4, log_every_n_steps=3, accumulate_grad_batches=2, callbacks=[meter, watch])
    trainer.fit(stage(name, tiny_model, lora), datamodule=make_data(examples, layout=layout))
    assert sorted(watch.found) == [1, 2, 3, 4]
    between = [(step, *read) for step, found in watch.found.items() for read in found if step != 3]
    own = [read for read in between if not any(name in read[2] for name in OTHERS)]
    assert not own, "\n\n".join(f"step {step}: {what}\n{where}" for step, what, where in own)
    assert layout == "padded" or not between
    assert watch.found[3], "the watch sees nothing, not even what a logged step reads"


def test_what_the_progress_bar_shows_lies_on_the_host(tiny_model, conversations, make_data, make_trainer):
    """Lightning reads it back at every micro-batch, not only when it changes."""
    shown = []
    sft = stage("sft", tiny_model, lora=False)
    sft.log = lambda name, value, prog_bar=False, **_: shown.append((name, value)) if prog_bar else None
    make_trainer(max_steps=1).fit(sft, datamodule=make_data(conversations))
    assert [name for name, _ in shown] == ["train/loss"]
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for _, value in shown)


def test_the_watch_finds_what_reads():
    found = []
    values = torch.arange(6.0)
    with Operators(found, lambda tensor: False), Methods(found, lambda tensor: False):
        for read in (
            lambda: float(values.sum()),
            lambda: bool((values > 9).any()),
            lambda: values[values > 2],
            lambda: values.tolist(),
            lambda: values.to("cpu"),
            lambda: values.cpu(),
            lambda: torch.bincount(values.long(), minlength=6),
            lambda: values.long().repeat_interleave(values.long()),
        ):
            before = len(found)
            read()
            assert len(found) > before
        before = len(found)
        values[torch.tensor([0, 2])].sum().to(values.device)
        assert len(found) == before
