"""What would make a run fit: options that need less memory, and what each would come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lit_align.cli.budget import budget_of
from lit_align.cli.situation import Situation
from lit_align.models.memory import FLOAT
from lit_align.models.source import LoraSettings

EIGHT_BIT = 2 + 2 * FLOAT / 256
"""Bytes a weight of two moments in 8 bits, with a scale for each block of 256."""


@dataclass(frozen=True)
class Remedy:
    """An option that needs less memory: its name, what it would be alone, and with all before it."""

    option: str
    alone: Situation
    together: Situation


def remedies(situation: Situation, most: float) -> Iterator[Remedy]:
    """Options that are still open, those first that cost least.

    Args:
        situation: As configured.
        most: Bytes that a device may hold.
    """
    together = whole = situation
    for option, change in _changes(situation, most):
        # What takes no shards is added to those above it but fsdp2.
        together = change(whole if change is _in_eight_bits else together)
        whole = whole if together.sharded else together
        yield Remedy(option, change(situation), together)


def _changes(situation: Situation, most: float) -> Iterator[tuple[str, Callable[[Situation], Situation]]]:
    main, shared = situation.trained[0], situation.sharded and situation.devices > 1
    if not all(role.source.gradient_checkpointing for role in situation.trained):
        name = " and ".join(f"{role.name}.gradient_checkpointing" for role in situation.trained)
        yield f"{name}: true", lambda s: s.with_sources(lambda source: replace(source, gradient_checkpointing=True))
    if situation.most > situation.accumulate:
        yield f"accumulate_grad_batches: {situation.most}", lambda s: replace(s, accumulate=situation.most)
    if main.source.lora is None:
        yield f"{main.name}.lora: {{r: 16}}", _with_lora
    elif main.source.quantization is None and main.source.path and not main.source.location[1] and not shared:
        yield f"{main.name}.quantization: nf4", _in_four_bits
    if situation.stage == "dpo" and any(role.name == "reference" for role in situation.roles):
        yield "reference_cache: true", lambda s: replace(s, roles=tuple(r for r in s.roles if r.name != "reference"))
    quantised = any(role.source.quantization for role in situation.roles)
    if not shared and not quantised and situation.takes_shards:
        number = situation.devices if situation.devices > 1 else _enough_devices(situation, most)
        yield f"strategy: fsdp2 over {number} devices", lambda s: _in_shards(s, number)
    if not situation.sharded and situation.state(torch.float32) > 2 * EIGHT_BIT:
        yield "optimizer: bitsandbytes.optim.AdamW8bit (not with fsdp2)", _in_eight_bits


def _in_eight_bits(situation: Situation) -> Situation:
    return replace(situation, state=lambda dtype: EIGHT_BIT, takes_shards=False)


def _in_four_bits(situation: Situation) -> Situation:
    # What has no adapters is trained whole, and cannot be packed.
    return situation.with_sources(lambda source: replace(source, quantization="nf4") if source.lora else source)


def _in_shards(situation: Situation, number: int) -> Situation:
    parts = situation.devices * situation.accumulate  # of a step, as before
    situation = situation.with_sources(lambda source: replace(source, quantization=None))  # packed weights stay whole
    return replace(situation, sharded=True, devices=number, accumulate=-(-parts // number))


def _enough_devices(situation: Situation, most: float) -> int:
    """The smallest of 2, 4, ... 64 on which it fits in shards; 64 if it fits on none."""
    numbers = (2, 4, 8, 16, 32, 64)
    return next((n for n in numbers if budget_of(_in_shards(situation, n)).peak <= most), numbers[-1])


def _with_lora(situation: Situation) -> Situation:
    own = situation.trained[0].source.frozen().to_dict()
    changed = situation.with_sources(lambda source: replace(source, lora=source.lora or LoraSettings()))
    # With adapters off the policy is its own reference.
    roles = tuple(r for r in changed.roles if r.name != "reference" or r.source.to_dict() != own)
    return replace(changed, roles=roles, lora=True)
