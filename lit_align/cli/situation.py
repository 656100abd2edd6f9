"""A run in numbers: which networks each device holds, how they are split, and how large a micro-batch is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import nn

from lit_align.models.meta import meta_network
from lit_align.models.reference import freeze
from lit_align.models.shapes import Shape, Weights, base_bytes, shape_of, weights_of
from lit_align.models.source import ModelSource
from lit_align.stages import LitDPO, LitPPO, LitReward
from lit_align.stages.policy import PolicyStage
from lit_align.stages.stage import Stage


@dataclass(frozen=True)
class Load:
    """The largest micro-batch of a device.

    Attributes:
        tokens: Positions that the trunk computes.
        scored: Scored tokens.
        part: Scored tokens of the largest example.
    """

    tokens: int
    scored: int
    part: int = 0


@dataclass(frozen=True)
class Rollout:
    """What PPO does before its updates.

    Attributes:
        rows: Answers side by side on one device.
        waiting: Whether more answers wait for a row.
        prompt: Tokens of the longest prompt.
        answer: Tokens of the longest answer.
        prompts: Prompts that are seen side by side at first.
        scoring_tokens: Tokens that are scored side by side, at most.
    """

    rows: int
    waiting: bool
    prompt: int
    answer: int
    prompts: int
    scoring_tokens: int


@dataclass(frozen=True)
class Role:
    """One network of a run.

    Attributes:
        name: policy, reference, reward_model or critic.
        source: Where it comes from.
        kind: "causal" or "scalar".
        trained: Whether it is trained.
        on_trunk: Whether its base is the policy's, which lies in memory once.
    """

    name: str
    source: ModelSource
    kind: str
    trained: bool
    on_trunk: bool = False

    @property
    def model(self) -> nn.Module:
        """The network on the meta device."""
        return _built(self.name, json.dumps(self.source.to_dict()), self.kind, self.trained)

    @cached_property
    def shape(self) -> Shape:
        """See `shape_of`."""
        return shape_of(self.model)

    @cached_property
    def weights(self) -> Weights:
        """See `weights_of`; of a role on the trunk, with the base that it computes with."""
        return weights_of(self.model)

    @cached_property
    def frozen_bytes(self) -> int:
        """Bytes of its frozen weights, less those that are the policy's."""
        return self.weights.frozen_bytes - (base_bytes(self.model) if self.on_trunk else 0)


@lru_cache(maxsize=32)
def _built(name: str, source: str, kind: str, trained: bool) -> nn.Module:
    made = ModelSource.from_dict(json.loads(source))
    model = meta_network(made, kind, name)
    return model if trained else freeze(model)


@dataclass(frozen=True)
class Situation:
    """All that memory depends on.

    Attributes:
        stage: Name of the stage.
        roles: The networks in memory; trained ones first.
        device: "cpu" or "cuda".
        devices: Ranks, over all hosts.
        sharded: Whether they share every network (fsdp2); else each holds a copy.
        mixed: Whether autocast computes in 16 bits.
        accumulate: Micro-batches of a step on each device.
        load: The largest micro-batch, given ranks x micro-batches that share a step.
        most: Largest useful `accumulate`: then each micro-batch is one example.
        state: Bytes of the optimizer's state for each weight, given the weights' data type.
        spare: Whether the optimizer makes a copy of all gradients while it works (a "foreach" one on a GPU).
        takes_shards: Whether the optimizer works on sharded weights.
        rollout: Of PPO; None = there is none.
        lora: Whether the policy has adapters, so that it is its own reference.
        own_reference: Whether each micro-batch asks the policy with its adapters off, as DPO does.
    """

    stage: str
    roles: tuple[Role, ...]
    device: str
    devices: int
    sharded: bool
    mixed: bool
    accumulate: int
    load: Callable[[int], Load]
    most: int
    state: Callable[[torch.dtype], float]
    spare: bool = False
    takes_shards: bool = True
    rollout: Rollout | None = None
    lora: bool = False
    own_reference: bool = False

    @property
    def trained(self) -> list[Role]:
        """Networks that are trained."""
        return [role for role in self.roles if role.trained]

    def largest(self) -> Load:
        """The largest micro-batch as configured."""
        return self.load(self.devices * self.accumulate)

    def with_sources(self, change: Callable[[ModelSource], ModelSource]) -> Situation:
        """The same with other sources of the trained networks."""
        roles = tuple(replace(r, source=change(r.source)) if r.trained else r for r in self.roles)
        return replace(self, roles=roles)


def roles_of(stage: Stage) -> tuple[Role, ...]:
    """The networks that a stage builds while it trains.

    Raises:
        ValueError: It is none of the library's.
    """
    roles = []
    if isinstance(stage, LitReward):
        roles.append(Role("reward_model", stage.reward_model_source, "scalar", True))
    elif isinstance(stage, PolicyStage):
        roles.append(Role("policy", stage.policy_source, "causal", True))
    else:
        raise ValueError(
            f"model: `plan` knows lit_align's stages and what is derived of them, got {type(stage).__name__}"
        )
    if isinstance(stage, LitPPO) and stage.estimator.needs_critic:
        roles.append(_scalar_role(stage, stage.critic_source, "critic", True))
    if isinstance(stage, (LitDPO, LitPPO)) and holds_reference(stage):
        source = stage.reference_source or stage.policy_source
        roles.append(Role("reference", source.frozen(), "causal", False))
    if isinstance(stage, LitPPO) and stage.reward_model_source is not None:
        roles.append(_scalar_role(stage, stage.reward_model_source.frozen(), "reward_model", False))
    return tuple(roles)


def _scalar_role(stage: LitPPO, source: ModelSource, name: str, trained: bool) -> Role:
    return Role(name, stage.hold.source_of(source, name), "scalar", trained, stage.hold.shared)


def holds_reference(stage: LitDPO | LitPPO) -> bool:
    """Whether a reference network of its own lies in memory while the stage trains."""
    return asks_reference(stage) and (stage.reference_source is not None or stage.policy_source.lora is None)


def asks_reference(stage: LitDPO | LitPPO) -> bool:
    """Whether a reference is asked while the stage trains: a network of its own, or the policy with adapters off."""
    return stage.has_reference and getattr(stage, "cached", None) is None
