import json
from types import SimpleNamespace

import pytest
import torch

from lit_align.callbacks.predictions import PredictionRows


class Strategy:
    def broadcast(self, value):
        return value

    def barrier(self):
        return None


def trainer(folder, rank=0, world_size=1):
    return SimpleNamespace(
        default_root_dir=str(folder),
        strategy=Strategy(),
        global_rank=rank,
        world_size=world_size,
        is_global_zero=rank == 0,
    )


def write(folder, batches, rank=0, world_size=1):
    callback, at = PredictionRows(), trainer(folder, rank, world_size)
    callback.setup(at, None, "predict")
    callback.on_predict_start(at, None)
    for loader, rows in batches:
        callback.on_predict_batch_end(at, None, rows, None, 0, loader)
    callback.on_predict_end(at, None)


def read(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_of_all_batches_stand_in_the_order_of_their_index(tmp_path):
    write(tmp_path, [(0, [{"index": 2, "answer": "二"}, {"index": 0, "answer": "零"}]), (0, [{"index": 1}]), (0, None)])
    assert [row["index"] for row in read(tmp_path)] == [0, 1, 2]
    assert "零" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_rows_of_all_ranks_become_one_file_without_repetitions(tmp_path):
    write(tmp_path, [(0, [{"index": 1}, {"index": 3}, {"index": 0}])], rank=1, world_size=2)
    write(tmp_path, [(0, [{"index": 0}, {"index": 2}])], rank=0, world_size=2)
    assert [row["index"] for row in read(tmp_path)] == [0, 1, 2, 3]


def test_rows_of_a_second_loader_are_kept_apart(tmp_path):
    write(tmp_path, [(0, [{"index": 0}]), (1, [{"index": 0}])])
    assert read(tmp_path) == [{"index": 0}, {"dataloader": 1, "index": 0}]


def test_tensors_become_numbers_and_what_json_cannot_hold_is_an_error(tmp_path):
    write(tmp_path, [(0, [{"index": 0, "logps": torch.tensor([1.5, 2.0])}])])
    assert read(tmp_path)[0]["logps"] == [1.5, 2.0]
    with pytest.raises(TypeError, match="predict_step returned a object"):
        write(tmp_path, [(0, [{"value": object()}])])
