"""The parts of a step on one GPU against the alternatives: attention, vocabulary projection, sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops
from benchmarks.gpu_setup import Setup, timed


def attention(setup: Setup) -> dict[str, Any]:
    """Forward and backward of one layer's attention: documents in a packed row, or a batch for SDPA's kernels."""
    from benchmarks.packed import attention_arguments
    from lit_align.models.attention import packed_attention

    heads, kv_heads, width, found = 16, 8, 128 if not setup.tiny else 8, {}
    for length in map(setup.size, (512, 2048, 4096)):
        documents = max(1, setup.size(16384) // length)
        given = attention_arguments([length] * documents, setup.device)

        def random(rows: int, number: int, columns: int) -> Tensor:
            made = torch.randn(rows, number, columns, width, device=setup.device, dtype=setup.dtype)
            return made.requires_grad_()

        row = [random(1, n, documents * length) for n in (heads, kv_heads, kv_heads)]
        batch = [random(documents, n, length) for n in (heads, kv_heads, kv_heads)]
        ways: dict[str, Callable[[], Tensor]] = {
            "packed": lambda row=row, given=given: packed_attention(torch.nn.Module(), *row, None, **given)[0]
        }
        for name, backend in backends(setup).items():
            ways[name] = lambda batch=batch, backend=backend: causal(batch, backend)
        needed = 3 * 2 * heads * width * documents * length**2
        for name, way in ways.items():
            cost = timed(setup, lambda way=way: way().sum().backward())
            found[f"{name}, {documents} x {length}"] = cost | {
                "ratio_to_floor": needed / setup.floor / (cost["ms"] / 1000)
            }
    return found


def backends(setup: Setup) -> dict[str, Any]:
    """SDPA's kernels for a dense causal batch."""
    from torch.nn.attention import SDPBackend

    if setup.device == "cpu":
        return {"SDPA": None}
    return {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


def causal(batch: Sequence[Tensor], backend: Any) -> Tensor:
    """Causal attention by one kernel."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with nullcontext() if backend is None else sdpa_kernel([backend]):
        return scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)


def head(setup: Setup) -> dict[str, Any]:
    """Forward and backward of the vocabulary projection: this project's, and logits with cross-entropy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_align.models.head import head_stats

    config = {**setup.config("Qwen3-0.6B"), "num_hidden_layers": 1}
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **values)
    model = AutoModelForCausalLM.from_config(made, dtype=setup.dtype).to(setup.device)
    weight, found = model.get_output_embeddings().weight, {}
    for rows in map(setup.size, (2048, 8192)):
        hidden = torch.randn(rows, config["hidden_size"], device=setup.device, dtype=setup.dtype).requires_grad_()
        targets = torch.randint(0, config["vocab_size"], (rows,), device=setup.device)
        ways = {
            "ours": lambda h=hidden, t=targets: head_stats(model, h, t).logps.sum(),
            "plain": lambda h=hidden, t=targets: torch.nn.functional.cross_entropy(
                torch.nn.functional.linear(h, weight).float(), t, reduction="sum"
            ),
        }
        needed = 3 * flops.head(flops.Shape.of(config), rows)
        for name, way in ways.items():
            cost = timed(setup, lambda way=way: way().backward())
            found[f"{name}, {rows} rows"] = cost | {"ratio_to_floor": needed / setup.floor / (cost["ms"] / 1000)}
    return found


def decode(setup: Setup) -> dict[str, Any]:
    """Answers of a forced length: this project's sampling, and `generate`."""
    from transformers import GenerationConfig

    from benchmarks.ours_ppo import NEVER, sampler
    from lit_align.models.load import load_causal_lm
    from lit_align.rollout.sampling import Sampling

    model, found = load_causal_lm(setup.source("Qwen3-0.6B")).to(setup.device), {}
    prompt, length = setup.size(256), setup.size(256)
    for batch in (2,) if setup.tiny else (64, 256):
        ids = torch.randint(2, model.config.vocab_size, (batch, prompt), device=setup.device)
        forced = GenerationConfig(max_new_tokens=length, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
        settings = Sampling(max_new_tokens=length, batch_size=batch)
        ways = {
            "ours": lambda ids=ids, settings=settings: sampler()(model, list(ids), [NEVER], settings),
            "generate": lambda ids=ids, forced=forced: model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=forced
            ),
        }
        for name, way in ways.items():
            cost = timed(setup, way, repeats=3, warmup=1)
            found[f"{name}, {batch} answers"] = cost | {"tokens_per_second": 1000 * batch * length / cost["ms"]}
    return found
