from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule

import lit_align.models.export as export_module_home
from lit_align.callbacks import ExportHF


class Reward(LightningModule):
    trained = {"reward_model": "scalar", "other": "causal"}  # noqa: RUF012
    tokenizer = "tokenizer"

    def __init__(self):
        super().__init__()
        self.reward_model, self.other = torch.nn.Linear(1, 1), torch.nn.Linear(2, 2)


@pytest.fixture
def written(monkeypatch):
    calls = []
    monkeypatch.setattr(export_module_home, "export_module", lambda *args: calls.append(args))
    return calls


def trainer(folder, **kwargs):
    return SimpleNamespace(**{"default_root_dir": str(folder), "fast_dev_run": False, "is_global_zero": True, **kwargs})


def test_the_main_network_goes_to_hf_in_the_run_folder(tmp_path, written):
    stage = Reward()
    ExportHF(merge_lora=False).on_train_end(trainer(tmp_path), stage)
    assert written == [(stage.reward_model, "tokenizer", tmp_path / "hf", False)]


@pytest.mark.parametrize("setting", [{"fast_dev_run": True}, {"is_global_zero": False}])
def test_neither_a_dry_run_nor_a_second_rank_writes(tmp_path, written, setting):
    ExportHF().on_train_end(trainer(tmp_path, **setting), Reward())
    assert written == []


def test_a_module_that_names_no_network_is_left_alone(tmp_path, written):
    ExportHF().on_train_end(trainer(tmp_path), LightningModule())
    assert written == []
