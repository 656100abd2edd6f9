"""The checker takes the clinic's own complete answers and nothing else, and its reward cannot be talked into more."""

from __future__ import annotations

import pytest

from datamodules.demo.checker import PART_CREDIT, judge, reward
from datamodules.demo.facts import ADVICE, AVOID, CONDITIONS
from datamodules.demo.world import complete_answer, questions

FLU = {
    "question": "I have fever and chills. What should I do?",
    "language": "en",
    "condition": "flu",
    "advice": "rest in bed",
    "avoid": "late nights",
}
GRIPPE = {
    "question": "我发烧，还发冷，怎么办？",
    "language": "zh",
    "condition": "流感",
    "advice": "卧床休息",
    "avoid": "熬夜",
}
RIGHT = {"en": "This is flu: rest in bed and avoid late nights.", "zh": "这是流感：请卧床休息，别熬夜。"}


def graded(record, answer):
    return reward([record["question"]], [answer], [record])[0]


@pytest.mark.parametrize("kind", ["findings", "condition"])
@pytest.mark.parametrize("number", range(3))
def test_each_complete_answer_to_each_held_out_question_is_right(kind, number):
    for question in questions("heldout", kind):
        answer = complete_answer(question, number)
        assert judge(question.record(), answer)
        assert graded(question.record(), answer) == 1.0


@pytest.mark.parametrize("record", [FLU, GRIPPE], ids=["en", "zh"])
def test_the_end_of_turn_token_may_stand_at_the_end_once(record):
    answer = RIGHT[record["language"]]
    assert judge(record, answer)
    assert judge(record, answer + "<|im_end|>")
    assert not judge(record, answer + "<|im_end|><|im_end|>")
    assert not judge(record, "<|im_end|>" + answer)


WRONG = {
    "empty": "",
    "blank": " \n",
    "only the end of turn": "<|im_end|>",
    "another condition": "This is angina: rest in bed and avoid late nights.",
    "another condition's answer": "This is angina: see the heart clinic and avoid heavy lifting.",
    "wrong advice": "This is flu: wear a mask and avoid late nights.",
    "wrong thing to avoid": "This is flu: rest in bed and avoid coffee.",
    "no condition": "You should rest in bed and avoid late nights.",
    "no advice": "It looks like flu. Please avoid late nights.",
    "nothing to avoid": "This is flu: rest in bed.",
    "condition alone": "This is flu.",
    "vague": "Please see a doctor soon.",
    "cut short": "This is flu: rest in bed and avoid late",
    "no full stop": "This is flu: rest in bed and avoid late nights",
    "said twice": f"{RIGHT['en']} {RIGHT['en']}",
    "goes on": f"{RIGHT['en']} This is angina.",
    "goes on as the user": f"{RIGHT['en']}\nuser\nWhat helps with flu?",
    "turned round": "This is flu: late nights and avoid rest in bed.",
    "asserts a second condition": "This is flu and angina: rest in bed and avoid late nights.",
    "asserts a second advice": "This is flu: rest in bed, wear a mask and avoid late nights.",
    "in capitals": RIGHT["en"].upper(),
    "in Chinese": RIGHT["zh"],
    "in two languages": "This is flu: 卧床休息 and avoid late nights.",
    "the question": FLU["question"],
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_what_is_not_a_complete_right_answer_is_wrong_and_earns_less(answer):
    assert not judge(FLU, answer)
    assert 0.0 <= graded(FLU, answer) <= 3 * PART_CREDIT < 1.0


def test_a_chinese_question_wants_a_chinese_answer():
    assert not judge(GRIPPE, RIGHT["en"])
    assert graded(GRIPPE, RIGHT["en"]) == 0.0
    assert graded(GRIPPE, "这是 flu：请卧床休息，别熬夜。") == 0.0


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("This is flu: rest in bed and avoid coffee.", 2),
        ("This is flu: rest in bed.", 2),
        ("This is flu: wear a mask and avoid late nights.", 2),
        ("This is angina: rest in bed and avoid coffee.", 1),
        ("This is flu.", 1),
        ("Please see a doctor soon.", 0),
        ("", 0),
        ("This is angina: see the heart clinic and avoid heavy lifting.", 0),
    ],
)
def test_the_reward_counts_right_parts(answer, parts):
    assert graded(FLU, answer) == pytest.approx(parts * PART_CREDIT)


def test_the_reward_counts_right_parts_in_chinese():
    assert graded(GRIPPE, "这是流感：请卧床休息，别喝酒。") == pytest.approx(2 * PART_CREDIT)
    assert graded(GRIPPE, "看来是流感。不要熬夜。") == pytest.approx(2 * PART_CREDIT)


def test_naming_everything_earns_nothing():
    everything = [c.name["en"] for c in CONDITIONS] + [a["en"] for a in ADVICE.values()]
    everything += [f"avoid {a['en']}" for a in AVOID.values()]
    assert graded(FLU, ", ".join(everything) + ".") == 0.0


def test_repeating_a_part_forfeits_its_credit():
    assert graded(FLU, "flu flu flu") == 0.0
    assert graded(FLU, "This is flu: rest in bed and rest in bed.") == pytest.approx(PART_CREDIT)


def test_a_part_in_the_wrong_role_earns_nothing():
    assert graded(FLU, "This is flu: avoid rest in bed and late nights.") == pytest.approx(PART_CREDIT)
    assert graded(GRIPPE, "这是流感：请熬夜，别卧床休息。") == pytest.approx(PART_CREDIT)


def test_a_name_inside_another_word_is_no_mention():
    assert graded(FLU, "This is influenza, or fluid.") == 0.0


def test_rewards_come_one_per_response_in_order():
    answers = ["", RIGHT["zh"], "这是流感。"]
    assert reward(["", "", ""], answers, [GRIPPE] * 3) == [0.0, 1.0, pytest.approx(PART_CREDIT)]


def test_lists_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        reward(["", ""], ["", ""], [FLU])


@pytest.mark.parametrize("record", [{"question": "What helps with flu?"}, {**FLU, "language": "de"}])
def test_a_record_that_is_no_question_of_the_demo_is_an_error(record):
    with pytest.raises(ValueError, match="question record: expected the fields language"):
        judge(record, RIGHT["en"])
