"""Looks at a sharded run's parts; started by the test under torchrun.

usage: torchrun --nproc-per-node 2 sharded_parts.py MODEL OUT

Each rank leaves OUT.<rank>: what it saw, by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import run_stages
from run_stages import build, items, made

from lit_align.batch import PromptBatch, StepTotals, pad
from lit_align.models import scalar, token_logps
from lit_align.models.fingerprint import fingerprint
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.modes import base_model
from lit_align.models.sharding import Sharding, building_in_shards
from lit_align.models.source import ModelSource
from lit_align.models.tokens import load_tokenizer
from lit_align.rollout.sampling import Sampling
from lit_align.strategies import FSDP2Strategy

# torch has renamed what FSDP calls.
RENAMED = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
GATHER, REDUCE = (new if hasattr(distributed, new) else old for new, old in RENAMED.items())


class Calls:
    """Counts what FSDP asks of other ranks."""

    def __init__(self) -> None:
        self.count = {GATHER: 0, REDUCE: 0}
        for name in self.count:
            setattr(distributed, name, self._counted(name, getattr(distributed, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count[name] += 1
            return call(*args, **kwargs)

        return counted

    @contextmanager
    def seen(self) -> Iterator[dict[str, int]]:
        """Yields a dictionary that afterwards holds the calls since."""
        before, found = dict(self.count), {}
        yield found
        found["gathers"], found["reductions"] = (self.count[name] - before[name] for name in (GATHER, REDUCE))


class Act(Callback):
    """Does something on both ranks before the first step, and counts calls for each micro-batch."""

    def __init__(self, calls: Calls, act: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.calls, self.act, self.result = calls, act, None
        self.reductions: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Acts."""
        if self.act is not None:
            self.result = self.act(pl_module, trainer.global_rank)

    def on_train_batch_start(self, *_: Any) -> None:
        """Notes the count."""
        self.before = self.calls.count[REDUCE]

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the difference."""
        self.reductions.append(self.calls.count[REDUCE] - self.before)


def fit(stage: Any, name: str, callback: Callback, **options: Any) -> Trainer:
    """Trains."""
    stage.log = lambda *_, **__: None
    settings = {"accumulate_grad_batches": 3, "max_steps": 2, "max_epochs": -1, "limit_val_batches": 0} | options
    strategy = FSDP2Strategy(timeout=timedelta(seconds=60))
    trainer = Trainer(**made.QUIET, devices=2, strategy=strategy, callbacks=[callback], **settings)
    trainer.fit(stage, datamodule=made.ExampleData(items(name), batch_size=8))
    return trainer


def reductions(model: str, calls: Calls) -> list[int]:
    """Reduce-scatters of each micro-batch."""
    callback = Act(calls)
    fit(build("sft", model), "sft", callback)
    return callback.reductions


def one_each(stage: Any, prompts: list[torch.Tensor], sampling: Sampling, noise: torch.Tensor | None) -> list[Any]:
    """One answer to each prompt."""
    return [answer for (answer,) in stage.answers(prompts, 1, sampling, noise)]


def rollouts(model: str, calls: Calls) -> dict[str, Any]:
    """Answers of two ranks whose shares and lengths differ, and what they asked each other meanwhile."""

    def act(stage: Any, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {"whole before": fingerprint(stage.policy)}
        prompts = [torch.arange(5 + i) + 10 * i for i in range(5)]
        share = prompts[:4] if rank == 0 else prompts[4:]
        noise = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        own = noise[:4] if rank == 0 else noise[4:]
        sampling = Sampling(max_new_tokens=6, batch_size=2)
        with calls.seen() as found["unequal shares"]:
            answers = one_each(stage, share, sampling, own)
        found["answers"] = [answer.input_ids for answer in answers]
        with calls.seen() as found["an empty share"]:
            one_each(stage, prompts if rank == 0 else [], sampling, noise if rank == 0 else None)
        kind = type(stage)
        ends, kind.stop_ids = kind.stop_ids, property(lambda self: list(range(300)) if rank == 0 else [])
        with calls.seen() as found["one ends at once"]:
            found["lengths"] = [len(answer.input_ids) for answer in one_each(stage, prompts, sampling, noise)]
        kind.stop_ids = ends
        batch = PromptBatch(share, [{}] * len(share), torch.arange(len(share)))
        found["kl"] = len(stage.kl_to_reference(batch, Sampling(max_new_tokens=3, batch_size=1)))
        found["rollout"] = len(stage._trajectories(batch if rank == 0 else PromptBatch((), (), torch.arange(0)), 0))
        found["whole after"] = fingerprint(stage.policy)
        found["left whole"] = [name for name, p in stage.named_parameters() if not isinstance(p, DTensor)]
        return found

    callback = Act(calls, act)
    fit(build("ppo", model), "ppo", callback, max_steps=1, accumulate_grad_batches=1)
    return callback.result


def answers_inside_a_step(model: str, calls: Calls) -> list[str]:
    """Fingerprints of the trained policy, without and with answers sampled between the micro-batches of a step."""

    class Asks(Act):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.answer([torch.arange(4)], Sampling(max_new_tokens=2))

    found = []
    for callback in (Act(calls), Asks(calls)):
        stage = build("sft", model)
        fit(stage, "sft", callback)
        found.append(fingerprint(stage.policy))
    return found


def passes_of_the_frozen(model: str, calls: Calls) -> int:
    """Passes that FSDP remembers of a network that never has a backward: they would add up for ever."""
    stage = build("dpo", model)
    fit(stage, "dpo", Act(calls))
    return len(base_model(stage.reference)._get_fsdp_state()._comm_ctx.post_forward_order)


def mixed(name: str, model: str, calls: Calls, **options: Any) -> dict[str, Any]:
    """Types and losses of a run that computes in bfloat16."""
    stage, seen = build(name, model), {}
    losses: list[float] = []

    def act(stage: Any, rank: int) -> None:
        net = getattr(stage, stage.trained[0])
        base_model(net).base_model.layers[0].register_forward_hook(lambda m, i, o: seen.update(hidden=str(o.dtype)))
        head = getattr(base_model(net), "score", None)
        if head is not None:
            # Before it computes: afterwards it is in shards again.
            head.register_forward_pre_hook(lambda m, i: seen.update(score=str(m.weight.dtype)))

    class Watch(Act):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            seen["gradients"] = sorted({str(p.grad.dtype) for p in pl_module.parameters() if p.grad is not None})
            losses.append(pl_module.train_means.compute()["loss"])

    fit(stage, name, Watch(calls, act), **options)
    seen["weights"] = sorted({str(p.dtype) for p in stage.parameters()})
    return seen | {"losses": losses}


ARCHITECTURES = {
    "qwen2": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2},
}


def architectures(model: str, out: Path) -> dict[str, tuple[float, float]]:
    """For each: how far log-probabilities and the gradients' norm of shards are from those of the whole."""
    found = {}
    sharding = Sharding(distributed.device_mesh.init_device_mesh("cpu", (2,)))
    batch = pad(items("sft")[:3], range(3), StepTotals(1.0, 1.0))
    for kind, settings in ARCHITECTURES.items():
        config = run_stages.SCRATCH | {"model_type": kind} | settings
        config = settings | {"model_type": kind} if kind == "gpt2" else config
        torch.manual_seed(5)
        made_here = load_causal_lm(ModelSource(config=config, tokenizer=model))
        if distributed.get_rank() == 0:
            made_here.save_pretrained(out / kind, max_shard_size="40KB")
            load_tokenizer(ModelSource(path=model)).save_pretrained(out / kind)
        distributed.barrier()
        source = ModelSource(path=str(out / kind))
        whole = load_causal_lm(source)
        with building_in_shards(sharding):
            shards = load_causal_lm(source)
        logps, norms = [], []
        for network in (whole, shards):
            network.eval()
            logps.append(token_logps(network, batch))
            logps[-1].sum().backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
            norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        found[kind] = (float((logps[0] - logps[1]).abs().max()), abs(norms[1] / norms[0] - 1))
    return found


def raised(act: Callable[[], Any]) -> str:
    """The error's text."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def errors(model: str, calls: Calls) -> dict[str, str]:
    """What cannot be, told on every rank."""
    import bitsandbytes

    stage = build("sft", model)
    stage.optimizer = bitsandbytes.optim.AdamW8bit
    other = Path(os.environ["OTHER_SHAPE"])
    sharding = Sharding(distributed.device_mesh.init_device_mesh("cpu", (2,)))

    def read() -> None:
        with building_in_shards(sharding):
            load_causal_lm(ModelSource(path=str(other)), "policy")

    built_before = build("sft", model)
    built_before.configure_model()
    return {
        "whole": raised(lambda: fit(built_before, "sft", Act(calls))),
        "optimizer": raised(lambda: fit(stage, "sft", Act(calls))),
        "precision": raised(lambda: fit(build("sft", model), "sft", Act(calls), precision="bf16-true")),
        "shape": raised(read),
    }


def padding_beyond_the_vocabulary(model: str) -> tuple[int, float]:
    """Rows of an embedding that has to grow for a padding token, and the sum of the new row."""
    sharding = Sharding(distributed.device_mesh.init_device_mesh("cpu", (2,)))
    known, scalar.separate_pad_token = scalar.separate_pad_token, lambda tokenizer: len(tokenizer)
    with building_in_shards(sharding):
        grown = load_scalar_model(ModelSource(path=model))
    scalar.separate_pad_token = known
    weight = grown.get_input_embeddings().weight.full_tensor()
    return len(weight), float(weight[-1].detach().abs().sum())


def main(model: str, out: str) -> None:
    """See the module."""
    calls = Calls()
    found = {
        "reductions": reductions(model, calls),
        "rollouts": rollouts(model, calls),
        "inside": answers_inside_a_step(model, calls),
        "passes": passes_of_the_frozen(model, calls),
        "bf16 sft": mixed("sft", model, calls, precision="bf16-mixed"),
        "bf16 rm": mixed("rm", model, calls, precision="bf16-mixed"),
        "fp32 sft": mixed("sft", model, calls),
        "padding": padding_beyond_the_vocabulary(model),
        "errors": errors(model, calls),
        "architectures": architectures(model, Path(out).parent),
    }
    run_stages.VARIANTS["sft in bfloat16"] = {"dtype": "bfloat16"}
    found["pure sft"] = mixed("sft in bfloat16", model, calls)
    torch.save(found, f"{out}.{os.environ['RANK']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
