"""The reference: what the policy was when training began, and never anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_align.models.load import load_causal_lm
from lit_align.models.modes import disable_dropout, evaluating, has_adapters
from lit_align.models.sharding import is_sharded
from lit_align.models.source import ModelSource

if TYPE_CHECKING:
    from peft import PeftModel

Network = TypeVar("Network", bound=nn.Module)


def make_reference(
    policy: PreTrainedModel | PeftModel, policy_source: ModelSource, reference_source: ModelSource | None = None
) -> PreTrainedModel | PeftModel | None:
    """The frozen reference of a policy that was built just now.

    A reference of its own is always read from where it lives, never copied out of a policy in memory, which may
    have been trained or resumed. Only a policy that starts from scratch lives nowhere else; it is copied, and must
    be fresh (compare fingerprints on resume).

    Args:
        policy: As `load_causal_lm(policy_source)` returned it.
        policy_source: Where the policy comes from.
        reference_source: Where the reference comes from; None = the start of the policy.

    Returns:
        A model in evaluation mode, without gradients and without dropout. None when the policy has adapters and
        no other reference is asked for: then the policy under `reference_mode` is the reference, and no copy is.
    """
    if reference_source is not None:
        return freeze(load_causal_lm(reference_source.frozen(), "reference"))
    if has_adapters(policy):
        return None
    if policy_source.config is not None:
        return freeze(_copy(policy, policy_source.frozen()))
    return freeze(load_causal_lm(policy_source.frozen(), "policy"))


@torch.no_grad()
def _copy(policy: nn.Module, source: ModelSource) -> nn.Module:
    if not is_sharded(policy):
        return deepcopy(policy)
    with torch.random.fork_rng():  # shards cannot be copied as a whole; the new model's own weights do not matter
        copy = load_causal_lm(source, "policy")
    for new, old in zip(copy.parameters(), policy.parameters(), strict=True):
        new.copy_(old)
    return copy


def freeze(model: Network) -> Network:
    """Evaluation mode, no gradients, no dropout even if somebody calls `train()` on it."""
    disable_dropout(model)
    return model.eval().requires_grad_(False)


@contextmanager
def reference_mode(policy: nn.Module) -> Iterator[nn.Module]:
    """While open, a policy with adapters is its own reference: adapters off, evaluation mode, no gradients.

    Raises:
        ValueError: When the policy has no adapters: it would be compared with itself.
    """
    if not has_adapters(policy):
        raise ValueError(
            f"expected a policy with adapters; got {type(policy).__name__}. Without adapters the reference is a model "
            "of its own: make_reference builds it."
        )
    with evaluating(policy), torch.no_grad(), policy.disable_adapter():
        yield policy
