"""Wrong edits of rewards, advantages and KL control."""

from __future__ import annotations

from tests.mutation.edit import Edit

ADVANTAGES = "rollout/advantages.py"
T_ADVANTAGES = "rollout/test_advantages.py::"

EDITS = [
    Edit(
        "KL penalty rewards",
        ADVANTAGES,
        "penalty = -kl_coef *",
        "penalty = kl_coef *",
        T_ADVANTAGES
        + "test_the_kl_penalty_is_on_every_token_of_the_policy_and_lowers_the_reward_where_the_policy_is_likelier",
    ),
    Edit(
        "score one token early",
        ADVANTAGES,
        "positions == last,",
        "positions == last - 1,",
        T_ADVANTAGES + "test_the_score_stands_on_the_last_token_of_the_policy",
    ),
    Edit(
        "score in the last column",
        ADVANTAGES,
        "last = torch.where(response_mask, positions, -1).amax(dim=1, keepdim=True)",
        "last = positions[-1]",
        T_ADVANTAGES + "test_the_score_stands_on_the_last_token_of_the_policy",
    ),
    Edit(
        "values shifted by one",
        ADVANTAGES,
        "gamma * next_value - values[:, t]",
        "gamma * values[:, t] - next_value",
        T_ADVANTAGES + "test_gae_by_hand",
    ),
    Edit(
        "GAE forgets the last token",
        ADVANTAGES,
        "reversed(range(values.shape[1]))",
        "reversed(range(values.shape[1] - 1))",
        T_ADVANTAGES + "test_gae_by_hand",
    ),
    Edit(
        "GAE forwards",
        ADVANTAGES,
        "reversed(range(values.shape[1]))",
        "range(values.shape[1])",
        T_ADVANTAGES + "test_gae_by_hand",
    ),
    Edit(
        "GAE without lambda",
        ADVANTAGES,
        "gamma * lam * next_advantage",
        "gamma * next_advantage",
        T_ADVANTAGES + "test_lambda_0_is_the_td_error",
    ),
    Edit(
        "a gap's value leaks",
        ADVANTAGES,
        "next_value = torch.where(inside, values[:, t], next_value)",
        "next_value = values[:, t]",
        T_ADVANTAGES + "test_a_gap_is_stepped_over_as_if_it_were_not_there",
    ),
    Edit(
        "a gap ends the response",
        ADVANTAGES,
        "next_value = torch.where(inside, values[:, t], next_value)",
        "next_value = torch.where(inside, values[:, t], 0.0)",
        T_ADVANTAGES + "test_a_gap_is_stepped_over_as_if_it_were_not_there",
    ),
    Edit(
        "garbage in the returns",
        ADVANTAGES,
        "torch.where(response_mask, advantages + values, 0.0)",
        "advantages + values",
        T_ADVANTAGES + "test_neither_side_nor_width_nor_content_of_padding_changes_anything",
    ),
    Edit(
        "RLOO counts itself",
        ADVANTAGES,
        "(groups.sum(dim=1, keepdim=True) - groups) / (num_answers - 1)",
        "groups.mean(dim=1, keepdim=True)",
        T_ADVANTAGES + "test_rloo_by_hand",
    ),
    Edit(
        "groups interleaved",
        ADVANTAGES,
        "full_precision(scores).view(-1, num_answers)",
        "full_precision(scores).view(num_answers, -1).T",
        "parity/test_policy.py::test_critic_free_advantages",
    ),
    Edit(
        "GRPO's biased std",
        ADVANTAGES,
        "keepdim=True) / (num_answers - 1)).sqrt()",
        "keepdim=True) / num_answers).sqrt()",
        T_ADVANTAGES + "test_grpo_by_hand",
    ),
    Edit(
        "KL controller of the wrong sign",
        ADVANTAGES,
        "self.coef *= 1 + error",
        "self.coef *= 1 - error",
        T_ADVANTAGES + "test_the_adaptive_coefficient_follows_the_published_controller",
    ),
    Edit(
        "KL controller unbounded",
        ADVANTAGES,
        "min(max(float(kl_per_sequence) / self.target - 1, -MAX_CHANGE), MAX_CHANGE)",
        "float(kl_per_sequence) / self.target - 1",
        T_ADVANTAGES + "test_the_adaptive_coefficient_follows_the_published_controller",
    ),
    Edit(
        "explained variance of the wrong residual",
        ADVANTAGES,
        "_masked_variance(returns - values, response_mask)",
        "_masked_variance(values, response_mask)",
        T_ADVANTAGES + "test_explained_variance_of_perfect_constant_and_inverted_predictions",
    ),
]
