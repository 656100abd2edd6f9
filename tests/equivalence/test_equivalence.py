"""However the work of a step is split, the same update: ten steps on real records, every stage, every loss."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import splits

from lit_align.models import token_loss
from lit_align.stages import LitSFT

BOUND = 1e-5


@pytest.fixture(scope="module")
def measure(shared_data, tiny_model, tmp_path_factory):
    """Runs a stage split in a way, once."""
    done = {}

    def once(stage, split, loss=None):
        key = (stage, repr(split), loss)
        if key not in done:
            done[key] = splits.run(stage, shared_data, str(tiny_model), split, loss)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield once


def check(whole, other):
    found = splits.difference(whole, other)
    assert max(found.values()) < BOUND, found


@pytest.mark.parametrize("split", splits.SPLITS, ids=lambda split: split.name)
@pytest.mark.parametrize("stage", splits.STAGES)
def test_the_update_does_not_depend_on_how_a_step_is_laid_out_or_split(stage, split, measure):
    check(measure(stage, splits.WHOLE), measure(stage, split))


@pytest.mark.parametrize("stage", splits.STAGES)
def test_micro_batches_with_nothing_to_train_change_nothing(stage, measure):
    check(measure(stage, splits.Split("few", data=splits.FEW)), measure(stage, splits.EMPTY))


@pytest.mark.parametrize("stage", [stage for stage in splits.STAGES if stage != "ppo"])
def test_steps_that_are_given_in_tokens_are_split_as_exactly(stage, measure):
    check(measure(stage, splits.Split("tokens", data=splits.TOKENS)), measure(stage, splits.BY_TOKENS))


@pytest.mark.parametrize("loss", splits.ALONE)
def test_every_loss_of_the_dpo_family_is_split_as_exactly(loss, measure):
    check(measure("dpo", splits.WHOLE, loss), measure("dpo", splits.SPLITS[2], loss))


@pytest.mark.slow
@pytest.mark.parametrize("split", splits.RANKS, ids=lambda split: split.name)
def test_two_processes_make_the_update_of_one(split, measure, shared_data, tiny_model):
    results = splits.run_on_ranks(shared_data, str(tiny_model), split)
    for stage in splits.STAGES:
        check(measure(stage, splits.WHOLE), results[stage])


def test_a_mean_of_micro_batch_means_would_be_seen(measure, monkeypatch):
    """What trainers were long wont to do: every micro-batch divided by its own tokens."""

    def naive(self, batch, batch_idx):
        return token_loss(self.policy, batch, self._nll) / batch.scored.weights.sum()

    whole = measure("sft", splits.WHOLE)
    monkeypatch.setattr(LitSFT, "training_step", naive)
    found = splits.difference(whole, measure("sft", splits.Split("naive", accumulate=3)))
    assert found["gradient norm"] > 1e-3 and found["weights"] > 1e-3
