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


def trainer(folder, told=None, **kwargs):
    """Of rank 0; of another rank, which is told something by rank 0, with `is_global_zero=False`."""
    settings = {"default_root_dir": str(folder), "fast_dev_run": False, "is_global_zero": True, "said": [], **kwargs}

    def broadcast(value):
        settings["said"].append(value)
        return value if settings["is_global_zero"] else told

    return SimpleNamespace(**settings, strategy=SimpleNamespace(broadcast=broadcast))


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


def test_an_export_that_fails_on_rank_0_ends_the_other_ranks_too(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export_module_home, "export_module", fails)
    first = trainer(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        ExportHF().on_train_end(first, Reward())
    assert first.said == ["OSError: no space left"]
    with pytest.raises(ValueError, match="rank 0 has failed: OSError: no space left"):
        ExportHF().on_train_end(trainer(tmp_path, first.said[0], is_global_zero=False), Reward())


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_training(tmp_path):
    ExportHF().on_fit_start(trainer(tmp_path), Reward())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "diary.txt").touch()
    first = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"hf holds diary\.txt"):
        ExportHF().on_fit_start(first, Reward())
    with pytest.raises(ValueError, match=r"rank 0 has failed: .*hf holds diary\.txt"):
        ExportHF().on_fit_start(trainer(tmp_path, first.said[0], is_global_zero=False), Reward())
    ExportHF().on_fit_start(trainer(tmp_path, fast_dev_run=True), Reward())
