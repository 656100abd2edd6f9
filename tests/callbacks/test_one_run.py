"""Ranks end together where rank 0 cannot write into the run's folder."""

from types import SimpleNamespace

import pytest

from lit_align.callbacks import OneRun


def test_a_folder_that_rank_0_cannot_write_ends_every_rank(tmp_path):
    (tmp_path / "taken").write_text("a file")
    said = []

    def rank(number: int) -> None:
        def broadcast(value):
            said.append(value)
            return said[0]

        trainer = SimpleNamespace(is_global_zero=number == 0, strategy=SimpleNamespace(broadcast=broadcast))
        with pytest.raises(ValueError, match=r"run_dir: rank 0 cannot write into .*taken/run: .*[Nn]ot a directory"):
            OneRun(tmp_path / "taken" / "run")._same_folder(trainer)

    rank(0)
    rank(1)
    assert len(said) == 2  # each took part
