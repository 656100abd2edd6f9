"""A cut keeps the end of the prompt and the start of the response, and never all but the trained tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.formats import OverlongError, Place
from datamodules.overlong import CUT_PROMPT, CUT_RESPONSE, fit_pair, fit_prompt, fit_turns

HERE = Place("a.jsonl:1")


def turns(prompt, response):
    """Ids 0, 1, ...; the response is trained."""
    weights = np.array([0.0] * prompt + [1.0] * response, dtype=np.float32)
    return np.arange(prompt + response), weights


@pytest.mark.parametrize(
    ("prompt", "response", "budget", "first", "size", "cuts"),
    [
        (3, 4, 7, 0, 7, []),
        (5, 4, 7, 2, 7, [CUT_PROMPT]),  # 3 of the prompt and the whole response
        (9, 3, 8, 4, 8, [CUT_PROMPT]),  # the response leaves room for more than half
        (2, 9, 8, 0, 8, [CUT_RESPONSE]),  # a short prompt is kept whole
        (9, 9, 8, 5, 8, [CUT_PROMPT, CUT_RESPONSE]),  # half and half
    ],
)
def test_the_prompt_gives_way_first_and_keeps_half_of_the_budget(prompt, response, budget, first, size, cuts):
    ids, weights, told = fit_turns(*turns(prompt, response), budget, "truncate", HERE)
    assert ids.tolist() == list(range(first, first + size))
    assert told == cuts and weights.any()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 30))
def test_a_cut_conversation_fits_is_a_window_and_is_trained(prompt, response, budget):
    ids, weights, cuts = fit_turns(*turns(prompt, response), budget, "truncate", HERE)
    assert len(ids) == len(weights) == min(prompt + response, budget)
    assert np.all(np.diff(ids) == 1)
    assert weights[1:].any() and ids[weights > 0][0] == prompt  # the response's first token stays, and is scored
    assert (CUT_PROMPT in cuts) == (ids[0] > 0)
    assert (CUT_RESPONSE in cuts) == (ids[-1] < prompt + response - 1)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(2, 30))
def test_a_cut_pair_fits_and_both_answers_keep_their_start(prompt, chosen, rejected, budget):
    parts = np.arange(prompt), (np.arange(chosen), np.arange(100, 100 + rejected))
    cut, (good, bad), cuts = fit_pair(*parts, budget, "truncate", HERE)
    assert len(cut) + max(len(good), len(bad)) <= budget
    assert cut.tolist() == list(range(prompt))[prompt - len(cut) :] and len(cut) >= 1
    assert good.tolist() == list(range(len(good))) and len(good) >= 1
    assert bad.tolist() == list(range(100, 100 + len(bad))) and len(bad) >= 1
    assert (CUT_PROMPT in cuts) == (len(cut) < prompt)
    assert (CUT_RESPONSE in cuts) == (len(good) < chosen or len(bad) < rejected)


def test_answers_that_a_cut_makes_equal_are_refused():
    with pytest.raises(OverlongError, match="equal in the 2 tokens") as caught:
        fit_pair(np.arange(2), (np.array([1, 2, 3]), np.array([1, 2, 4])), 4, "truncate", HERE)
    assert caught.value.reason == "equal answers after a cut"


def test_a_cut_prompt_keeps_its_end():
    ids, cuts = fit_prompt(np.arange(9), 4, "truncate", HERE)
    assert (ids.tolist(), cuts) == ([5, 6, 7, 8], [CUT_PROMPT])


@pytest.mark.parametrize("overlong", ["raise", "drop"])
def test_without_leave_to_cut_the_size_and_the_budget_are_told(overlong):
    with pytest.raises(
        OverlongError, match=r"a\.jsonl:1: found an example of 9 tokens; expected at most 8 \(max_length\)"
    ):
        fit_turns(*turns(4, 5), 8, overlong, HERE)
    with pytest.raises(OverlongError, match=r"found a prompt of 9 tokens; .* Raise max_length, or set overlong"):
        fit_pair(np.arange(9), (np.arange(1), np.arange(2)), 8, overlong, HERE)
    with pytest.raises(OverlongError, match="found a prompt of 9 tokens"):
        fit_prompt(np.arange(9), 8, overlong, HERE)
