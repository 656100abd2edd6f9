"""The loader of rollouts: its state says where it is, wherever it was put."""

import numpy as np
import pytest
import torch

from lit_align.batch import Branch, Example, PlannedLoader, PromptBatch
from lit_align.rollout.loader import RolloutLoader

PROMPTS = [torch.tensor([i, i]) for i in range(6)]
EPOCHS, PARTS = 2, 2


def loader(answered=lambda number: None):
    """Two rollouts of three prompts an epoch; the answer is the number of the rollout."""

    def collate(examples, plan):
        return PromptBatch(tuple(examples), ({},) * len(examples), torch.tensor(plan.indices), plan.repeats)

    def collect(batch, number):
        answered(number)
        return [Example(ids, (Branch(torch.tensor([number]), torch.ones(1)),)) for ids in batch.prompt_ids]

    sizes = {"lengths": np.full(6, 2), "trained_weights": np.zeros(6), "batch_size": 3}
    prompts = PlannedLoader(PROMPTS, collate, **sizes)
    return RolloutLoader(prompts, collect, ppo_epochs=EPOCHS, num_minibatches=1, micro_batches=PARTS)


def rest(of):
    """What is left of the rollout, and all of the next."""
    return [batch.input_ids.tolist() for _ in range(2) for batch in of]


@pytest.mark.parametrize("seen", range(EPOCHS * PARTS + 1))
@pytest.mark.parametrize("times", [1, 2])
def test_a_loader_that_is_put_somewhere_says_so_and_goes_on_there(seen, times):
    """Once, or handed on a second time before anything was taken: a trainer may ask for a new loader."""
    first = loader()
    taken = iter(first)
    for _ in range(seen):
        next(taken)
    state = first.state_dict()
    for _ in range(times):
        other = loader()
        other.load_state_dict(state)
        state = other.state_dict()
    whole = loader()
    expected = rest(whole)
    begun = seen // PARTS * PARTS  # a step that was begun is made anew
    if begun < EPOCHS * PARTS:
        assert rest(other) == expected[begun:]
    else:
        assert rest(other)[: EPOCHS * PARTS] == expected[EPOCHS * PARTS :]


def test_the_last_state_that_was_put_back_counts():
    first, other = loader(), loader()
    start, taken = first.state_dict(), iter(first)
    next(taken)
    for state in (first.state_dict(), start):
        other.load_state_dict(state)
    assert rest(other) == rest(loader())


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("taken", [PARTS, EPOCHS * PARTS], ids=["cut short", "whole"])
def test_prompts_of_a_rollout_that_failed_are_sampled_after_a_resume(failing, taken):
    def judge_is_away(number):
        if number == failing:
            raise ConnectionError

    first, other, whole = loader(judge_is_away), loader(), loader()
    expected = [batch.input_ids.tolist() for _ in range(failing) for batch in whole][-EPOCHS * PARTS :]
    with pytest.raises(ConnectionError):
        for _ in range(failing):
            for _ in zip(range(taken), first, strict=False):
                pass
    other.load_state_dict(first.state_dict())
    assert [batch.input_ids.tolist() for batch in other] == expected


@pytest.mark.parametrize("seen", range(1, EPOCHS * PARTS + 1))
def test_a_micro_batch_that_the_trainer_did_not_get_through_counts_as_new(seen):
    first, other, whole = loader(), loader(), loader()
    taken = iter(first)
    for _ in range(seen):
        next(taken)
    first.unfinished = lambda: True
    other.load_state_dict(first.state_dict())
    assert rest(other) == rest(whole)[(seen - 1) // PARTS * PARTS :]
