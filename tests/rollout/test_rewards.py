"""Rewards from callables: weighted, checked, and in the order of the answers."""

import pytest
import torch
from transformers import AutoTokenizer

from lit_align.rollout.reward_functions import chinese_share
from lit_align.rollout.rewards import RewardFunction, function_scores
from lit_align.rollout.sampling import Answer


def test_chinese_share_counts_letters_only():
    assert chinese_share([], ["你好", "ab你好", "12!", "", "hello"], []) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_functions_add_up_with_their_weights(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    seen = []

    def length(prompts, answers, records):
        seen.append((prompts, answers, records))
        return [float(len(answer)) for answer in answers]

    answers = [Answer(torch.tensor([*tokenizer("hey").input_ids, tokenizer.eos_token_id]), True, torch.zeros(4))]
    prompt = torch.tensor(tokenizer("who?").input_ids)
    functions = [RewardFunction(length, weight=2.0), RewardFunction(lambda p, a, r: [1.0])]
    assert function_scores(functions, tokenizer, [prompt], answers, [{"key": 1}]).tolist() == [7.0]
    assert seen == [(["who?"], ["hey"], [{"key": 1}])]


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], "expected 2 scores, got 1"), ([1.0, float("nan")], "finite number within float32, got nan")],
)
def test_answers_of_a_callable_are_checked(scores, message):
    with pytest.raises(ValueError, match=message):
        RewardFunction(lambda p, a, r: scores)(["", ""], ["", ""], [{}, {}])


@pytest.mark.parametrize(("score", "weight"), [(1e39, 1.0), (-1e39, 1.0), (1e38, -10.0), (1.0, 1e39)])
def test_a_score_that_float32_cannot_hold_is_refused(score, weight):
    """Rewards are added up in float32, where it would be infinite."""
    with pytest.raises(ValueError, match=r"expected a finite number within float32, got .* for 'hi'"):
        RewardFunction(lambda p, a, r: [score], weight)([""], ["hi"], [{}])
    assert RewardFunction(lambda p, a, r: [3e38])([""], ["hi"], [{}]) == [3e38]
