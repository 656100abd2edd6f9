"""The file of reference log-probabilities: what its name depends on, that it is whole, how it is looked up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_align.batch import Branch, Example, StepTotals, pack
from lit_align.models.load import load_causal_lm
from lit_align.models.modes import disable_dropout
from lit_align.models.reference_cache import (
    DamagedError,
    cache_folder,
    cache_key,
    describe_network,
    examples_digest,
    read_logps,
    sequence_logps,
    write_logps,
)
from lit_align.models.source import LoraSettings, ModelSource


def pair(prompt: list[int], *answers: list[int], weights: list[float] | None = None) -> Example:
    branches = [Branch(torch.tensor(ids), torch.tensor(weights or [1.0] * len(ids))) for ids in answers]
    return Example(torch.tensor(prompt, dtype=torch.long), tuple(branches))


PAIRS = [pair([1, 2, 3], [4, 5], [6]), pair([7], [8], [9, 10]), pair([1, 2], [3, 4], [5, 6])]
OTHERS = {
    "order": [PAIRS[1], PAIRS[0], PAIRS[2]],
    "fewer": PAIRS[:2],
    "token": [*PAIRS[:2], pair([1, 2], [3, 4], [5, 7])],
    "border": [*PAIRS[:2], pair([1], [2, 3, 4], [5, 6])],
    "border of answers": [*PAIRS[:2], pair([1, 2], [3, 4, 5], [6])],
    "swapped": [*PAIRS[:2], pair([1, 2], [5, 6], [3, 4])],
    "scored": [*PAIRS[:2], pair([1, 2], [3, 4], [5, 6], weights=[0.0, 1.0])],
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_scored_otherwise_has_another_digest(name: str) -> None:
    assert examples_digest(OTHERS[name]) != examples_digest(PAIRS)


def test_weights_of_losses_and_values_are_no_part_of_it() -> None:
    same = [*PAIRS[:2], replace(pair([1, 2], [3, 4], [5, 6], weights=[0.5, 2.0]), values={"weight": 3.0})]
    assert examples_digest(same) == examples_digest(PAIRS) == examples_digest(list(PAIRS))


def test_a_network_is_described_by_what_it_computes(tiny_model: Path) -> None:
    source = ModelSource(path=str(tiny_model))
    model = load_causal_lm(source)
    plain = describe_network(model)
    adapted = load_causal_lm(replace(source, lora=LoraSettings(r=2, dropout=0.5), gradient_checkpointing=True))
    disable_dropout(adapted)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    assert describe_network(adapted) == plain == describe_network(load_causal_lm(source).eval())
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5000.0}
    assert cache_key(network=describe_network(model)) != cache_key(network=plain)
    assert describe_network(load_causal_lm(replace(source, attention="eager"))) != plain
    assert describe_network(load_causal_lm(replace(source, dtype="bfloat16"))) != plain


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / f"{'ab' * 32}.safetensors"
    for dtype in (torch.float64, torch.float32):
        logps = -100 * torch.rand(7, 2, dtype=dtype)
        write_logps(path, logps)
        assert torch.equal(read_logps(path, 7), logps) and read_logps(path, 7).dtype == dtype
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / f"{'ab' * 32}.safetensors"
    write_logps(path, -100 * torch.rand(3, 2, dtype=torch.float64))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(DamagedError):
            read_logps(path, 3)
    # The header's own spaces and field order carry no number: of it, only what changes the table has to be noticed.
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedError, match="its numbers are not those that were written"):
            read_logps(path, 3)
    with pytest.raises(FileNotFoundError):
        read_logps(tmp_path / "none.safetensors", 3)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"{'ab' * 32}.safetensors"
    write_logps(path, torch.zeros(3, 2))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_logps(path, torch.ones(3, 2))
    assert torch.equal(read_logps(path, 3), torch.zeros(3, 2)) and len(list(tmp_path.iterdir())) == 1


def test_rows_are_found_by_index_whatever_stands_where() -> None:
    table = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    indices = [2, 0, 2]  # a mixture may hold an example twice
    batch = pack([PAIRS[i] for i in indices], indices, StepTotals(1.0, 3.0))
    found = sequence_logps(table, batch)
    assert found[batch.groups].tolist() == [[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]] and found.dtype == torch.float64
    assert sequence_logps(table, pack([], [], StepTotals(1.0, 3.0))).shape == (0,)
    with pytest.raises(IndexError):
        sequence_logps(table, pack([PAIRS[0]], [3], StepTotals(1.0, 1.0)))


def test_files_lie_beside_tokenised_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a" / "reference"
    assert cache_folder(str(tmp_path / "b")) == tmp_path / "b" / "reference"
