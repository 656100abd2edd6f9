"""Modes of a network: without dropout, and for a while in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

REMEMBERED = "_dropout_settings"


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is peft's wrapper around a frozen one; asked without importing peft, which takes seconds."""
    return hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> Any:
    """The transformers model itself, out of the adapters' wrapper if there is one."""
    return model.get_base_model() if has_adapters(model) else model  # type: ignore[operator]


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0; its adapters' and its attention's are among them.

    Preference and policy losses compare the policy with a reference or with its own earlier pass: dropout would
    be noise in the difference, and the loss of the first step would not be ln 2. The configuration's own values
    are remembered, and come back in the export.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)
    config: Any = getattr(model, "config", None)
    if config is not None:
        # Some architectures (Falcon, Persimmon) read their configuration anew in every forward.
        settings = dropout_settings(model) | _zero(config.get_text_config())
        setattr(base_model(model), REMEMBERED, settings)


def dropout_settings(model: nn.Module) -> dict[str, float]:
    """What the configuration said before `disable_dropout`; empty when nothing was changed."""
    return dict(getattr(base_model(model), REMEMBERED, {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode; afterwards each of its modules is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _zero(owner: object) -> dict[str, float]:
    found = {key: value for key, value in vars(owner).items() if "drop" in key and isinstance(value, float) and value}
    for key in found:
        setattr(owner, key, 0.0)
    return found
