"""Wrong edits of masked.py, language.py and policy.py."""

from __future__ import annotations

from tests.mutation.edit import Edit

MASKED, LANGUAGE, POLICY = "losses/masked.py", "losses/language.py", "losses/policy.py"
T_MASKED, T_LANGUAGE, T_POLICY = "losses/test_masked.py::", "losses/test_language.py::", "losses/test_policy.py::"

EDITS = [
    # ---- masked.py
    Edit(
        "multiplies by the mask",
        MASKED,
        "torch.where(mask, full_precision(values), 0.0).sum(dim)",
        "(full_precision(values) * mask).sum(dim)",
        T_MASKED + "test_garbage_outside_the_mask_changes_neither_value_nor_gradient",
    ),
    Edit(
        "mean over padding too",
        MASKED,
        "mask.sum(dim).clamp(min=1)",
        "torch.ones_like(mask).sum(dim)",
        T_MASKED + "test_sums_and_means_by_hand",
    ),
    Edit(
        "empty mask divides by zero",
        MASKED,
        "mask.sum(dim).clamp(min=1)",
        "mask.sum(dim)",
        T_MASKED + "test_an_empty_mask_gives_zero_with_a_backward",
    ),
    Edit(
        "whitens with the unmasked mean",
        MASKED,
        "mean = masked_mean(values, mask)",
        "mean = values.mean()",
        T_MASKED + "test_garbage_outside_the_mask_changes_neither_value_nor_gradient",
    ),
    Edit(
        "whitens with the unmasked variance",
        MASKED,
        "masked_mean(centred.square(), mask) + WHITEN_EPS",
        "centred.square().mean() + WHITEN_EPS",
        T_MASKED + "test_whitening_uses_the_biased_variance",
    ),
    Edit(
        "whitens with the unbiased variance",
        MASKED,
        "masked_mean(centred.square(), mask) + WHITEN_EPS",
        "masked_sum(centred.square(), mask) / (mask.sum() - 1) + WHITEN_EPS",
        T_MASKED + "test_whitening_uses_the_biased_variance",
    ),
    Edit(
        "adds the mean back",
        MASKED,
        "return whitened if shift_mean",
        "return whitened if not shift_mean",
        T_MASKED + "test_whitened_values_have_mean_0_and_variance_1",
    ),
    Edit(
        "trusts the rounded mean",
        MASKED,
        "centred - masked_mean(centred, mask)",
        "centred",
        T_MASKED + "test_values_without_spread_whiten_to_zeros",
    ),
    # ---- language.py
    Edit(
        "logits are not shifted",
        LANGUAGE,
        "logits[:, :-1]",
        "logits[:, 1:]",
        T_LANGUAGE + "test_logits_predict_the_next_label",
    ),
    Edit(
        "shifted the wrong way",
        LANGUAGE,
        "labels[:, 1:]",
        "labels[:, :-1]",
        T_LANGUAGE + "test_logits_predict_the_next_label",
    ),
    Edit(
        "divides by all tokens",
        LANGUAGE,
        "(targets != ignore_index).sum().clamp(min=1)",
        "targets.numel()",
        T_LANGUAGE + "test_the_default_denominator_is_the_trained_tokens_of_the_call",
    ),
    Edit(
        "counts the first label",
        LANGUAGE,
        "(targets != ignore_index).sum().clamp(min=1)",
        "(labels != ignore_index).sum().clamp(min=1)",
        T_LANGUAGE + "test_the_first_label_and_the_last_logits_have_no_part",
    ),
    Edit(
        "means before dividing",
        LANGUAGE,
        'reduction="sum"',
        'reduction="mean"',
        T_LANGUAGE + "test_micro_batches_with_the_steps_denominator_add_up_and_means_of_means_do_not",
    ),
    Edit(
        "half-precision logits stay half",
        LANGUAGE,
        "full_precision(logits[:, :-1])",
        "logits[:, :-1]",
        T_LANGUAGE + "test_half_precision_logits_are_widened_first",
    ),
    Edit(
        "forgets the weights",
        LANGUAGE,
        "(full_precision(token_logps) * weights).sum()",
        "full_precision(token_logps).sum()",
        T_LANGUAGE + "test_weighted_nll_by_hand",
    ),
    # ---- policy.py
    Edit(
        "ratio upside down",
        POLICY,
        "(token_logps - old_token_logps).clamp",
        "(old_token_logps - token_logps).clamp",
        T_POLICY + "test_clipped_objective",
    ),
    Edit(
        "no clip",
        POLICY,
        "ratio.clamp(1 - clip_range, 1 + high)",
        "ratio",
        T_POLICY + "test_clipped_objective",
    ),
    Edit(
        "the better instead of the worse objective",
        POLICY,
        "loss, clipped = torch.maximum(free, held)",
        "loss, clipped = torch.minimum(free, held)",
        T_POLICY + "test_clipped_objective",
    ),
    Edit(
        "advantages of the wrong sign",
        POLICY,
        "free = -advantages * ratio",
        "free = advantages * ratio",
        T_POLICY + "test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient",
    ),
    Edit(
        "upper range ignored",
        POLICY,
        "clip_range if clip_range_high is None else clip_range_high",
        "clip_range",
        T_POLICY + "test_the_upper_range_may_differ_from_the_lower_one",
    ),
    Edit(
        "dual clip for every sign",
        POLICY,
        "(advantages < 0) & (loss > bound)",
        "loss > bound",
        T_POLICY + "test_dual_clip_bounds_only_negative_advantages",
    ),
    Edit(
        "log-ratios unbounded",
        POLICY,
        ".clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "",
        T_POLICY + "test_absurd_log_ratios_stay_finite",
    ),
    Edit(
        "value clipped around the return",
        POLICY,
        "(old_values + step.clamp(-clip_range, clip_range) - returns)",
        "(returns + (values - returns).clamp(-clip_range, clip_range) - returns)",
        T_POLICY + "test_clipped_value",
    ),
    Edit(
        "value loss takes the smaller error",
        POLICY,
        "0.5 * torch.maximum(free, held)",
        "0.5 * torch.minimum(free, held)",
        T_POLICY + "test_clipped_value",
    ),
    Edit(
        "value loss without its half",
        POLICY,
        "ValueLoss(0.5 * torch.maximum(free, held)",
        "ValueLoss(torch.maximum(free, held)",
        T_POLICY + "test_clipped_value",
    ),
    Edit(
        "k3 of the wrong sign",
        POLICY,
        "torch.expm1(-log_ratio) + log_ratio",
        "torch.expm1(log_ratio) - log_ratio",
        T_POLICY + "test_kl_estimators",
    ),
    Edit(
        "k2 without its half",
        POLICY,
        "0.5 * log_ratio.square()",
        "log_ratio.square()",
        "parity/test_kl_placements.py::test_k2_in_the_loss_is_the_gradient_of_the_divergence",
    ),
    Edit(
        "KL of the wrong sign",
        POLICY,
        "log_ratio = token_logps - reference_token_logps",
        "log_ratio = reference_token_logps - token_logps",
        T_POLICY + "test_kl_estimators",
    ),
]
