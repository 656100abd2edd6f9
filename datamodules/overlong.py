"""What becomes of examples that do not fit in `max_length` tokens: refused, dropped or cut.

A cut keeps the end of the prompt and the start of the response. The prompt gives way first, down to half of the
budget; then the response loses its end (and with it the end-of-turn token: a cut answer must not teach to stop).
So a cut example never loses all of its trained tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from datamodules.formats import OverlongError, Place

Overlong = Literal["raise", "drop", "truncate"]

CUT_PROMPT, CUT_RESPONSE = "prompt cut at its start", "response cut at its end"


def kept_prompt(prompt: int, response: int, max_length: int) -> int:
    """Prompt tokens that a cut leaves: at least half of the budget, more if the response leaves room."""
    return min(prompt, max(max_length - response, max_length // 2))


def fit_turns(
    ids: np.ndarray, weights: np.ndarray, max_length: int, overlong: Overlong, place: Place
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Fits a conversation: everything before its first trained token is the prompt, the rest the response.

    Returns:
        The ids, the weights, and what was cut.
    """
    if len(ids) <= max_length:
        return ids, weights, []
    _refuse_unless_cut(len(ids), max_length, overlong, place)
    prompt = int(np.flatnonzero(weights)[0])
    kept = kept_prompt(prompt, len(ids) - prompt, max_length)
    window = slice(prompt - kept, prompt - kept + max_length)
    return ids[window], weights[window], _cuts(kept < prompt, window.stop < len(ids))


def fit_pair(
    prompt: np.ndarray, answers: tuple[np.ndarray, np.ndarray], max_length: int, overlong: Overlong, place: Place
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], list[str]]:
    """Fits a prompt with two answers: prompt and longer answer together have to fit.

    Returns:
        The prompt, the answers, and what was cut.

    Raises:
        OverlongError: It does not fit and may not be cut, or the answers are equal as far as they fit.
    """
    longest = max(map(len, answers))
    if len(prompt) + longest <= max_length:
        return prompt, answers, []
    _refuse_unless_cut(len(prompt) + longest, max_length, overlong, place, len(prompt))
    kept = kept_prompt(len(prompt), longest, max_length)
    room = max_length - kept
    chosen, rejected = (answer[:room] for answer in answers)
    if np.array_equal(chosen, rejected):
        found = f"answers that are equal in the {room} tokens that max_length leaves them"
        mend = "Raise max_length or delete the record"
        raise OverlongError.at(place, "equal answers after a cut", found, "different answers", mend)
    return prompt[len(prompt) - kept :], (chosen, rejected), _cuts(kept < len(prompt), room < longest)


def fit_prompt(ids: np.ndarray, max_length: int, overlong: Overlong, place: Place) -> tuple[np.ndarray, list[str]]:
    """Fits a prompt: a cut keeps its end.

    Returns:
        The ids, and what was cut.
    """
    if len(ids) <= max_length:
        return ids, []
    _refuse_unless_cut(len(ids), max_length, overlong, place, len(ids))
    return ids[len(ids) - max_length :], [CUT_PROMPT]


def _refuse_unless_cut(length: int, max_length: int, overlong: Overlong, place: Place, prompt: int = 0) -> None:
    if overlong == "truncate":
        return
    what = f"a prompt of {prompt} tokens" if prompt >= max_length else f"an example of {length} tokens"
    expected = f"at most {max_length} (max_length)"
    mend = 'Raise max_length, or set overlong to "truncate" or "drop"'
    raise OverlongError.at(place, "overlong", what, expected, mend)


def _cuts(prompt: bool, response: bool) -> list[str]:
    return [CUT_PROMPT] * prompt + [CUT_RESPONSE] * response
