"""Wrong edits of the preference losses."""

from __future__ import annotations

from tests.mutation.edit import Edit

BASE, RELATIVE = "losses/preference/base.py", "losses/preference/relative.py"
ABSOLUTE, TRANSPORT = "losses/preference/absolute.py", "losses/preference/transport.py"
FREE, PAIRS = "losses/preference/reference_free.py", "losses/preference/pairs.py"

PARITY = "parity/test_preference.py::test_float64_equals_the_oracle"
PREFERENCE, REWARD = "losses/preference/test_preference.py::", "losses/preference/test_pairs.py::"

EDITS = [
    Edit(
        "chosen ratio without its reference",
        BASE,
        "return self.policy_chosen - self.reference_chosen",
        "return self.policy_chosen",
        PREFERENCE + "test_at_the_reference_the_loss_is_ln_2",
    ),
    Edit(
        "rejected ratio takes the chosen reference",
        BASE,
        "return self.policy_rejected - self.reference_rejected",
        "return self.policy_rejected - self.reference_chosen",
        PREFERENCE + "test_at_the_reference_the_float32_loss_is_ln_2_exactly",
    ),
    Edit(
        "rewards keep their graph",
        BASE,
        "return chosen.detach(), rejected.detach()",
        "return chosen, rejected",
        PREFERENCE + "test_rewards_are_beta_times_the_log_ratios_and_carry_no_gradient",
    ),
    Edit(
        "shapes unchecked",
        BASE,
        "check_same_shape(**pairs._asdict())",
        "pass",
        PREFERENCE + "test_columns_are_refused_instead_of_broadcast",
    ),
    Edit(
        "chosen and rejected swapped",
        RELATIVE,
        "return pairs.chosen_log_ratios - pairs.rejected_log_ratios",
        "return pairs.rejected_log_ratios - pairs.chosen_log_ratios",
        PREFERENCE + "test_the_policy_that_prefers_chosen_has_the_lower_loss",
    ),
    Edit(
        "sigmoid of the wrong sign",
        RELATIVE,
        "        return -logsigmoid(scores)\n",
        "        return -logsigmoid(-scores)\n",
        "golden/test_preference.py::test_the_mean_loss_is_the_recorded_one[sigmoid|beta0.1]",
    ),
    Edit(
        "sigmoid without beta",
        RELATIVE,
        "smoothed_logistic(self.beta * margins(pairs), self.label_smoothing)",
        "smoothed_logistic(margins(pairs), self.label_smoothing)",
        "golden/test_preference.py::test_the_mean_loss_is_the_recorded_one[sigmoid|beta0.5]",
    ),
    Edit(
        "smoothing subtracts",
        RELATIVE,
        "logsigmoid(scores) - label_smoothing * logsigmoid(-scores)",
        "logsigmoid(scores) + label_smoothing * logsigmoid(-scores)",
        PARITY,
    ),
    Edit(
        "robust without its scale",
        RELATIVE,
        " / (1 - 2 * swapped)",
        "",
        "golden/test_preference.py::test_the_mean_loss_is_the_recorded_one[robust|beta0.1|ls0.1]",
    ),
    Edit("hinge at zero", RELATIVE, "relu(1 - self.beta", "relu(-self.beta", PARITY),
    Edit(
        "IPO without lengths",
        RELATIVE,
        "rejected = per_token(rejected, pairs.rejected_lengths)",
        "pass",
        "golden/test_preference.py::test_the_mean_loss_is_the_recorded_one[ipo|beta0.1]",
    ),
    Edit("IPO's target without 1/2", RELATIVE, "1 / (2 * self.beta)", "1 / self.beta", PARITY),
    Edit(
        "EXO's labels swapped",
        RELATIVE,
        "math.log(1 - self.smoothing), math.log(self.smoothing)",
        "math.log(self.smoothing), math.log(1 - self.smoothing)",
        PARITY,
    ),
    Edit(
        "DiscoPOP as a product",
        RELATIVE,
        "torch.exp(logsigmoid(scores / self.tau) - scores)",
        "torch.sigmoid(scores / self.tau) * torch.exp(-scores)",
        PREFERENCE + "test_far_from_the_reference_loss_and_gradient_stay_finite",
    ),
    Edit("NCA forgets to hold chosen", ABSOLUTE, " - 0.5 * logsigmoid(-chosen)", "", PARITY),
    Edit(
        "BCO of the wrong sign",
        ABSOLUTE,
        "-logsigmoid(chosen) - logsigmoid(-rejected)",
        "-logsigmoid(chosen) - logsigmoid(rejected)",
        PARITY,
    ),
    Edit(
        "SPPO pulls the loser up",
        ABSOLUTE,
        "(pairs.rejected_log_ratios + target)",
        "(pairs.rejected_log_ratios - target)",
        PREFERENCE + "test_the_policy_that_prefers_chosen_has_the_lower_loss",
    ),
    Edit("APO zero raises rejected", ABSOLUTE, "+ torch.sigmoid(rejected)", "- torch.sigmoid(rejected)", PARITY),
    Edit(
        "APO down raises chosen",
        ABSOLUTE,
        "return torch.sigmoid(chosen) + 1",
        "return -torch.sigmoid(chosen) + 1",
        PARITY,
    ),
    Edit(
        "AOT does not sort",
        TRANSPORT,
        "policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values",
        "policy = pairs.policy_chosen - pairs.policy_rejected",
        PARITY,
    ),
    Edit("ORPO without its likelihood", FREE, "return -chosen - self.beta", "return -self.beta", PARITY),
    Edit(
        "odds without their denominator", FREE, "return logps - torch.log(-torch.expm1(logps))", "return logps", PARITY
    ),
    Edit(
        "odds of certainty are infinite",
        FREE,
        "logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)",
        "pass",
        PREFERENCE + "test_a_response_of_probability_one_gives_finite_numbers",
    ),
    Edit(
        "SimPO's margin helps",
        FREE,
        "(chosen - rejected - self.gamma_beta_ratio)",
        "(chosen - rejected + self.gamma_beta_ratio)",
        PARITY,
    ),
    Edit(
        "reward loss of the wrong sign",
        PAIRS,
        "difference = chosen - rejected\n",
        "difference = rejected - chosen\n",
        REWARD + "test_the_chosen_reward_is_pushed_up_and_the_rejected_one_down",
    ),
    Edit(
        "margin makes it easier",
        PAIRS,
        "difference - margin",
        "difference + margin",
        REWARD + "test_margin_and_centring_by_hand",
    ),
    Edit(
        "centres the difference",
        PAIRS,
        "(chosen + rejected).square()",
        "(chosen - rejected).square()",
        REWARD + "test_margin_and_centring_by_hand",
    ),
    Edit(
        "likelihood is summed",
        PAIRS,
        "return -per_token(policy_chosen, chosen_lengths)",
        "return -policy_chosen",
        REWARD + "test_chosen_nll_averages_each_response_over_its_own_tokens",
    ),
]
