"""Parts of a network, as architectures name them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the trunk, as the architecture names them.

    Raises:
        ValueError: It does not.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"{type(model).__name__} does not say what its layers are, so it cannot be worked on by layer")
    return layers


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether the module is a matrix and perhaps a bias, and nothing else: no adapter, not quantised.

    FSDP makes subclasses of what it shards, so the class is not asked for itself.
    """
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
