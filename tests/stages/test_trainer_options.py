"""Options of Lightning's Trainer that are not meant to change numbers do not, for a stage of examples and for PPO."""

import pytest
import torch

from lit_align.models.source import ModelSource
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitPPO, LitSFT

OPTIONS = {
    "anomalies are looked for": {"detect_anomaly": True},
    "benchmark": {"benchmark": True},
    "deterministic": {"deterministic": True},
    "no inference mode": {"inference_mode": False},
    "a time to end": {"max_time": "00:01:00:00"},
    "synchronised batch norms": {"sync_batchnorm": True},
    "validation inside epochs": {"val_check_interval": 0.5},
    "profiler": {"profiler": "simple"},
}


@pytest.fixture
def trained(tiny_model, conversations, prompts, make_data, make_trainer):
    def train(stage, **options):
        torch.manual_seed(0)
        source = ModelSource(path=str(tiny_model))
        if stage is LitPPO:
            module, items = LitPPO(source, reward_model=source, sampling=Sampling(max_new_tokens=6)), prompts
        else:
            module, items = stage(source), conversations
        trainer = make_trainer(max_epochs=2, gradient_clip_val=1.0, **options)
        trainer.fit(module, datamodule=make_data(items))
        assert trainer.global_step > 2
        return module.state_dict()

    yield train
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("stage", [LitSFT, LitPPO])
def test_options_that_change_no_numbers(stage, trained):
    expected = trained(stage)
    for name, options in OPTIONS.items():
        got = trained(stage, **options)
        assert all(torch.equal(got[key], value) for key, value in expected.items()), name
