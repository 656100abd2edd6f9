"""A reward model that was never trained says so before it judges."""

import warnings

import pytest
import torch

from lit_align.models.source import LoraSettings, ModelSource
from lit_align.stages import LitReward


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
@pytest.mark.parametrize("trained", [False, True])
def test_predictions_of_a_new_head_are_announced(trained, lora, tiny_model, pairs, make_data, make_trainer):
    stage = LitReward(ModelSource(path=str(tiny_model), lora=lora))
    stage.configure_model()
    if trained:
        heads = [p for name, p in stage.reward_model.named_parameters() if "score" in name and p.requires_grad]
        with torch.no_grad():
            heads[0].fill_(0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = make_trainer().predict(stage, datamodule=make_data(pairs))
    assert any("its head is new, so every reward is 0" in str(warning.message) for warning in said) != trained
    assert any(value != 0 for batch in rows for row in batch for value in row["rewards"]) == trained
