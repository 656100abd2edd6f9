"""Data modules: one LightningDataModule for each form of data of the alignment road."""

from datamodules.preference import PreferenceDataModule
from datamodules.pretrain import PretrainDataModule
from datamodules.prompt import PromptDataModule
from datamodules.sft import SFTDataModule

__all__ = ["PreferenceDataModule", "PretrainDataModule", "PromptDataModule", "SFTDataModule"]
