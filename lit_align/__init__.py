"""Pre-training, SFT, reward model, DPO and PPO for language models, each a LightningModule with its own loss."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lit_align.models.source import LoraSettings, ModelSource
    from lit_align.stages.dpo import LitDPO
    from lit_align.stages.ppo import LitPPO
    from lit_align.stages.pretrain import LitPretrain
    from lit_align.stages.reward import LitReward
    from lit_align.stages.sft import LitSFT

__all__ = ["LitDPO", "LitPPO", "LitPretrain", "LitReward", "LitSFT", "LoraSettings", "ModelSource", "__version__"]

# Imported when asked for: torch and transformers take seconds, and `--help`, `export` and `pipeline` start without.
_HOMES = {
    "LitDPO": "lit_align.stages.dpo",
    "LitPPO": "lit_align.stages.ppo",
    "LitPretrain": "lit_align.stages.pretrain",
    "LitReward": "lit_align.stages.reward",
    "LitSFT": "lit_align.stages.sft",
    "LoraSettings": "lit_align.models.source",
    "ModelSource": "lit_align.models.source",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
