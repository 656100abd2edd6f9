"""Wrong edits of drawing tokens, of the decode loop's cache, and of where old log-probabilities come from."""

from __future__ import annotations

from tests.mutation.edit import Edit

DRAW, T_DRAW = "rollout/draw.py", "rollout/test_draw.py::"
SLOTS, DECODE = "rollout/engines/slots.py", "rollout/engines/decode.py"
AS_GENERATE = "rollout/test_engines.py::test_decode_answers_as_generate_does[llama-0.01-4]"

EDITS = [
    Edit(
        "a token of probability 0 may be drawn",
        DRAW,
        "weights.cumsum(-1, dtype=uniform.dtype), goal, right=True)",
        "weights.cumsum(-1, dtype=uniform.dtype), goal, right=False)",
        T_DRAW + "test_all_numbers_find_a_token_of_positive_probability",
    ),
    Edit(
        "log-probabilities are not normalised",
        DRAW,
        ".to(total.dtype) - total.log()",
        ".to(total.dtype)",
        T_DRAW + "test_a_token_is_drawn_where_its_place_holds_the_number",
    ),
    Edit(
        "temperature multiplies the logits",
        DRAW,
        "shifted /= temperature",
        "shifted *= temperature",
        T_DRAW + "test_a_token_is_drawn_where_its_place_holds_the_number",
    ),
    Edit("a prompt's first token is hidden", SLOTS, "<= lengths).long()", "< lengths).long()", AS_GENERATE),
    Edit(
        "positions stand still",
        SLOTS,
        "self.position[:rows] += drawn - self.drawn[:rows]",
        "self.position[:rows] += 0",
        AS_GENERATE,
    ),
    Edit(
        "a row that goes on in vain runs out of positions",
        SLOTS,
        "self.position[:rows] += drawn - self.drawn[:rows]",
        "self.position[:rows] += 1",
        "rollout/test_engines.py::test_rows_that_go_on_in_vain_stay_within_the_learned_positions[4-plain]",
    ),
    Edit(
        "a row that moves leaves its numbers behind",
        SLOTS,
        "return [self.mask, self.token, self.position, self.drawn, self.noise]",
        "return [self.mask, self.token, self.position, self.drawn]",
        AS_GENERATE,
    ),
    Edit(
        "a row that moves leaves its mask behind",
        SLOTS,
        "return [self.mask, self.token, self.position, self.drawn, self.noise]",
        "return [self.token, self.position, self.drawn, self.noise]",
        AS_GENERATE,
    ),
    Edit(
        "the cache is moved without its mask",
        SLOTS,
        "self.mask[rows, new] = kept",
        "self.mask[rows, old] = kept",
        AS_GENERATE,
    ),
    Edit("the first number is used twice", SLOTS, "lengths, 1, noise", "lengths, 0, noise", AS_GENERATE),
    Edit(
        "a prompt is seen again for each of its answers",
        DECODE,
        "list(dict.fromkeys(a // self.n for a in new))",
        "[a // self.n for a in new]",
        "rollout/test_engines.py::test_work_follows_the_live_rows",
    ),
    Edit(
        "several steps take the update's own log-probabilities for old ones",
        "stages/ppo_settings.py",
        "self.ppo_epochs == self.num_minibatches == 1",
        "self.ppo_epochs == 1",
        "stages/test_rollout.py::test_what_the_setting_means",
    ),
]
