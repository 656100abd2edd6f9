"""The stages of the road: one LightningModule a file, each with its own loss in its own `training_step`."""

from lit_align.stages.dpo import LitDPO
from lit_align.stages.ppo import LitPPO
from lit_align.stages.ppo_settings import PPOSettings
from lit_align.stages.pretrain import LitPretrain
from lit_align.stages.reward import LitReward
from lit_align.stages.sft import LitSFT

__all__ = ["LitDPO", "LitPPO", "LitPretrain", "LitReward", "LitSFT", "PPOSettings"]
