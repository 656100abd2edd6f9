"""From a situation to bytes: what each device holds at its peak, and what it sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lit_align.cli.situation import Role, Situation
from lit_align.models.memory import (
    FLOAT,
    HeadBytes,
    all_gather_bytes,
    all_reduce_bytes,
    head_bytes,
    kv_bytes,
    trunk_bytes,
)
from lit_align.models.projection import BLOCK, chunk_rows
from lit_align.rollout.engines.decode import SLACK, Decode

READ_EVERY = {"cpu": 1, "cuda": Decode.read_every}
"""Columns to spare in the cache of `Decode`, besides its `SLACK` where answers wait."""


@dataclass
class Budget:
    """Bytes of one device.

    Attributes:
        held: What stays from step to step, by name.
        phases: What comes on top, by phase and by name; only one phase is at a time.
    """

    held: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return sum(self.held.values()) + sum(self.phases[self.peak_phase].values())


def budget_of(situation: Situation) -> Budget:
    """Adds up what a device holds; the terms are explained in docs/plan.md."""
    budget, shards = Budget(), situation.devices if situation.sharded else 1
    for role in situation.roles:
        budget.held[f"{role.name}, trained weights"] = role.weights.trained_bytes // shards
        budget.held[f"{role.name}, frozen weights"] = role.frozen_bytes // shards
    budget.held |= _update_state(situation, shards)
    budget.phases["forward and loss"] = _forward(situation)
    budget.phases["backward"] = _backward(situation)
    budget.phases["update"] = {"copies that the optimizer makes": _spare(situation) // shards}
    if situation.rollout is not None:
        budget.phases["rollout"] = _rollout(situation)
        budget.phases["scoring"] = _scoring(situation)
    budget.held = {name: size for name, size in budget.held.items() if size}
    budget.phases = {p: {n: size for n, size in parts.items() if size} for p, parts in budget.phases.items()}
    return budget


def _update_state(situation: Situation, shards: int) -> dict[str, int]:
    gradients = sum(role.weights.trained_bytes for role in situation.trained)
    # What FSDP2 adds up over micro-batches is whole: it is only shared out with the last of them.
    whole = situation.sharded and situation.accumulate > 1
    state = sum(_state(situation, role) for role in situation.trained)
    return {
        "gradients": gradients if whole else gradients // shards,
        "optimizer state": int(state / shards),
        "buckets of the all-reduce": gradients if situation.devices > 1 and not situation.sharded else 0,
    }


def _state(situation: Situation, role: Role) -> float:
    trained = (p for p in role.model.parameters() if p.requires_grad)
    return sum(p.numel() * situation.state(p.dtype) for p in trained)


def _spare(situation: Situation) -> int:
    trained = [p for role in situation.trained for p in role.model.parameters() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in trained]
    return sum(sizes) if situation.spare else 0


def _forward(situation: Situation) -> dict[str, int]:
    load, parts = situation.largest(), {}
    head = _head(situation, situation.trained[0])
    for role in situation.trained:
        source = role.source
        frozen = source.lora is not None
        tokens = trunk_bytes(role.shape, load.tokens, situation.mixed, frozen, source.gradient_checkpointing)
        parts[f"activations of the {role.name}"] = tokens
        parts |= _copies(situation, role)
    parts["hidden states of scored tokens"] = head.states
    parts["head: gradient of its weight"] = head.gradient
    if len(situation.trained) > 1:  # the critic's forward comes after the policy's head
        critic = situation.trained[1]
        tail = parts.pop(f"activations of the {critic.name}")
        parts["head: chunk, or the critic's activations"] = max(head.chunk, tail)
    else:
        parts["head: chunk of the vocabulary"] = head.chunk
    # Of a quantised base one matrix at a time is whole, from the backward pass' first one on: the head's chunk is free.
    spare = sum(size for name, size in parts.items() if name.startswith("head: chunk"))
    parts["a quantised matrix, turned back"] = max(0, max(map(_turned_back(situation), situation.trained)) - spare)
    return parts


def _turned_back(situation: Situation) -> Callable[[Role], int]:
    """Bytes of a role's largest quantised matrix in what it computes in, and of its scales."""

    def size(role: Role) -> int:
        compute = 2 if situation.mixed else role.shape.element
        return int(role.weights.packed * (compute + FLOAT / 64))

    return size


def _head(situation: Situation, role: Role) -> HeadBytes:
    load = situation.largest()
    part = load.part if situation.stage == "dpo" else 0
    return head_bytes(role.shape, load.scored, situation.device, situation.mixed, role.weights.head, part)


def _copies(situation: Situation, role: Role) -> dict[str, int]:
    """16-bit copies of the matrices under autocast, or what FSDP2 has gathered."""
    weights = role.weights
    if not situation.sharded or situation.devices == 1:
        return {f"16-bit copies of the {role.name}'s matrices": 2 * weights.matrices if situation.mixed else 0}
    gathered = weights.total_bytes - weights.layers_bytes + min(2 * weights.layer_bytes, weights.layers_bytes)
    return {f"gathered weights of the {role.name}": int(gathered * _narrow(situation, role))}


def _narrow(situation: Situation, role: Role) -> float:
    """What FSDP2 gathers of a byte of the shards: halves of float32 under bf16-mixed."""
    return 2 / role.shape.element if situation.mixed else 1.0


def _whole(situation: Situation, name: str, *roles: Role) -> dict[str, int]:
    """The largest of networks that are gathered whole one after the other, as sampling and scoring do in shards."""
    shared = situation.sharded and situation.devices > 1
    return {name: int(max(r.weights.total_bytes * _narrow(situation, r) for r in roles))} if shared else {}


def _backward(situation: Situation) -> dict[str, int]:
    """Its end: all gradients are there, and the table's comes as a whole matrix beside the head's."""
    parts, shared = {}, situation.sharded and situation.devices > 1
    for role in situation.trained:
        table = role.weights.table * role.shape.element
        parts[f"gradient of the {role.name}'s embeddings"] = table * (2 if shared and role.weights.head else 1)
        parts |= _copies(situation, role) if shared else {}
    return parts


def _rollout(situation: Situation) -> dict[str, int]:
    rollout, role = situation.rollout, situation.trained[0]
    assert rollout is not None
    spare = READ_EVERY[situation.device] + SLACK * rollout.waiting
    columns = rollout.prompt + rollout.answer + spare
    shape = role.shape
    logits = shape.vocabulary * FLOAT * (rollout.prompts + 2 * rollout.rows)
    cast = shape.vocabulary * shape.width * _head_copy(situation, shape.element)
    return {
        "keys and values of answers": kv_bytes(shape, rollout.rows, columns),
        "keys and values of prompts": kv_bytes(shape, rollout.prompts, rollout.prompt),
        "logits": logits + cast,
        **_whole(situation, "policy, gathered whole", role),
    }


def _head_copy(situation: Situation, element: int) -> int:
    """Bytes of a weight of the copy of the head that a decode step multiplies with; 0 = none is made."""
    if situation.device == "cpu":
        return FLOAT if element == 2 else 0
    return 2 if situation.mixed and element == FLOAT else 0


def _scoring(situation: Situation) -> dict[str, int]:
    rollout = situation.rollout
    assert rollout is not None
    tokens = min(rollout.scoring_tokens, max(rollout.prompts, 1) * rollout.prompt + rollout.rows * rollout.answer)
    shape = max((role.shape for role in situation.roles), key=lambda s: s.width)
    compute = 2 if situation.mixed else shape.element
    layer = tokens * (2 * shape.width * shape.element + 3 * shape.inner * compute)
    vocabulary = situation.trained[0].shape.vocabulary
    block = min(BLOCK, vocabulary) if situation.device == "cpu" else vocabulary
    rows = min(tokens, chunk_rows(vocabulary, torch.device(situation.device)))
    return {
        "one layer at a time": layer,
        "head: a block of the vocabulary": 2 * rows * block * FLOAT,
        **_whole(situation, "largest network, gathered whole", *situation.roles),
    }


def sent_bytes(situation: Situation) -> dict[str, int]:
    """Bytes that one device sends for each optimizer step, by collective; nothing for one device."""
    n = situation.devices
    if n == 1:
        return {}
    numbers = [role.weights for role in situation.trained]
    if not situation.sharded:
        return {"all-reduce of gradients": all_reduce_bytes(sum(w.trained_bytes for w in numbers), n)}
    gathered, reduced = 0.0, 0
    # PPO's updates know from the rollout what frozen networks say.
    for role in situation.trained if situation.stage == "ppo" else situation.roles:
        weights = role.weights
        # Layers are gathered for the forward and once more for the backward pass, the rest stays.
        gathered += (weights.total_bytes + weights.layers_bytes * role.trained) * _narrow(situation, role)
        reduced += weights.trained_bytes if role.trained else 0
    if situation.own_reference:  # a pass of its own, after which nothing of the policy stays
        gathered += situation.trained[0].weights.total_bytes * _narrow(situation, situation.trained[0])
    return {
        "all-gather of weights": situation.accumulate * all_gather_bytes(int(gathered), n),
        "reduce-scatter of gradients": all_gather_bytes(reduced, n),
    }
