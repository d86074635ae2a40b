"""Which test shows which detail of post-training, and which details are left out and why.

The list is that of the design notes: A1 policy gradients by comparison, A2 PPO, A3 losses of preference pairs (A3.4: what goes
wrong around them), A4 KTO, A5 reward models. A row may have tests and leave a part out.
"""

import ast
import dataclasses
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True)
class Detail:
    """`tests`: "file::test", the file without its directory and ending."""

    name: str
    tests: tuple[str, ...] = ()
    left_out: str = ""


def shown(name: str, *tests: str, left_out: str = "") -> Detail:
    """A test without a file is one of test_objective_details.py."""
    return Detail(name, tuple(test if "::" in test else f"test_objective_details::{test}" for test in tests), left_out)


A1 = [
    shown("the stop token is an action", "test_rl_step::test_the_stop_token_is_an_action_and_the_prompt_and_padding_are_not"),
    shown(
        "what a tool wrote is read and never trained on",
        "test_gae_passes_over_observations_and_ends_at_the_stop_token",
        "test_score_is_added_at_the_stop_token_not_at_the_last_column",
        "test_chat_encoder::test_the_trained_tokens_are_the_assistants_and_their_stop_token",
        left_out="answers are drawn in one turn: no tool is called while they are",
    ),
    shown(
        "scores do not depend on padding or other rows",
        "test_rollouts::test_scores_of_a_row_do_not_depend_on_padding_nor_on_the_rows_beside_it",
    ),
    shown(
        "samples that were cut off",
        "test_truncated_samples_are_kept_zeroed_or_penalised",
        "test_denominators_have_the_mask_of_the_numerators",
        "test_lengths_of_right_and_wrong_answers_are_apart",
    ),
    shown(
        "random numbers of each row and step",
        "test_rl_step::test_every_prompt_of_every_step_has_random_numbers_of_its_own",
        "test_rollouts::test_the_first_tokens_of_a_group_are_drawn_independently",
    ),
    shown("no dropout", left_out="no network here has dropout"),
    shown(
        "log-probabilities are of what was sampled from",
        "test_rollouts::test_the_ratio_of_the_first_update_is_1_at_every_temperature",
        "test_objective_config::test_rollouts_are_drawn_from_what_the_trainer_scores",
        "test_sampling::test_tokens_come_with_their_exact_probabilities",
    ),
    shown(
        "sampler, old policy and policy are three",
        "test_three_policies_are_distinct_and_only_the_trained_one_has_a_gradient",
        "test_importance_weights_truncate_and_reject",
        "test_objective_exact::test_importance_weights_of_sequences_undo_another_sampler",
        "test_objective_exact::test_truncated_importance_sampling_has_the_gradient_of_its_objective",
    ),
    shown(
        "their difference is measured and limited",
        "test_mismatch_is_zero_for_equal_policies_and_never_negative",
        "test_rl::test_a_sampler_that_disagrees_ends_the_run",
    ),
    shown(
        "sampler and trainer compute the same",
        "test_rl::test_the_first_update_is_on_policy_and_the_run_ends_with_a_result",
        "test_rl::test_sampler_and_trainer_agree_for_what_else_may_be_set",
        "test_engine::test_every_kind_of_network_decodes_as_it_is_trained",
    ),
    shown("softmax in float32", "test_logprobs::test_logits_and_softmax_of_a_bfloat16_network_are_float32"),
    shown(
        "the group's mean as a baseline, and RLOO's",
        "test_loo_baseline_is_the_scaled_group_mean_whatever_the_group_sizes",
        "test_objective_exact::test_expected_gradient_is_that_of_the_expected_reward",
    ),
    shown(
        "which standard deviation divides",
        "test_group_std_has_ddof_1_and_eps_outside_of_the_root_and_batch_std_is_of_rewards",
        "test_objective_golden::test_golden_value",
    ),
    shown("rounding is no variance", "test_zero_variance_is_found_exactly"),
    shown(
        "groups without variance are kept, dropped or sampled anew",
        "test_rewards_that_are_all_equal_teach_nothing_and_are_counted",
        "test_zero_variance_groups_are_kept_in_or_dropped_from_the_denominator",
        "test_dynamic_sampling_takes_the_first_informative_prompts_and_tells_what_is_missing",
        "test_effective_rows_are_those_that_the_policy_loss_pushes_of_all_rows",
    ),
    shown("a group of one", "test_a_group_of_one_is_not_compared_and_not_scaled", "test_objective_config::test_refuses"),
    shown(
        "several rewards",
        "test_rewards_of_several_kinds_are_normalised_each_or_summed",
        "test_rl_rewards::test_parts_of_the_reward_are_normalised_apart",
        "test_rewards::test_composition_by_hand",
    ),
    shown(
        "MaxRL",
        "test_maxrl_is_zero_where_no_answer_is_rewarded",
        "test_bad_rewards_are_left_out_and_counted",
        "test_objective_config::test_refuses",
    ),
    shown(
        "a group may lie on several devices",
        "test_objective_invariance::test_micro_batches_are_one_batch",
        "test_objective_invariance::test_eight_devices_are_one",
    ),
    shown(
        "at first the ratio is 1 and the clip inert; then what it clips is counted",
        "test_first_update_has_ratio_1_and_an_inert_clip",
        "test_clip_fractions_are_of_the_tokens_whose_gradient_the_clip_changes",
        "test_rl_updates::test_the_first_minibatch_has_ratio_1_and_later_ones_do_not",
    ),
    shown(
        "the clipped loss, with bounds of its own above and below",
        "test_clip_higher_and_dual_clip_against_a_case_by_case_definition",
        "test_objective_golden::test_golden_value",
        "test_objective_trl::test_policy_loss_and_gradient",
    ),
    shown(
        "a bound where the advantage is negative (two-sided clipping is the same loss)",
        "test_clip_higher_and_dual_clip_against_a_case_by_case_definition",
        "test_objective_trl::test_policy_loss_and_gradient",
    ),
    shown("CISPO", "test_cispo_differentiates_the_logprob_only_and_drops_no_token"),
    shown(
        "GSPO",
        "test_gspo_is_the_sequence_level_objective_in_value_and_gradient",
        "test_objective_config::test_refuses",
    ),
    shown(
        "SAPO",
        "test_sapo_begins_as_the_plain_ratio_and_fades_by_the_sign_of_the_advantage",
        "test_objective_trl::test_policy_loss_and_gradient",
        left_out="GMPO and DPPO-TV: two more bounds for a policy that has moved, on which no run here depends",
    ),
    shown("four aggregations", "test_objective_golden::test_golden_value"),
    shown(
        "denominators are of the whole batch and of the numerator's mask",
        "test_denominators_have_the_mask_of_the_numerators",
        "test_objective_invariance::test_micro_batches_are_one_batch",
        "test_objective_invariance::test_eight_devices_are_one",
        "test_rl_updates::test_micro_batches_change_nothing_but_memory",
        "test_rl_updates::test_eight_devices_do_what_one_does",
    ),
    shown("each component has its normaliser", "test_components_have_normalisers_of_their_own"),
    shown(
        "what each estimate of the KL is, in value and gradient",
        "test_k3_is_not_of_the_inverted_ratio",
        "test_objective_exact::test_kl_in_the_loss_has_the_gradients_that_are_stated",
        "test_objective_exact::test_kl_estimators_of_whole_sequences",
        "test_objective_bugs::test_k1_in_the_loss_has_a_gradient_without_direction",
    ),
    shown(
        "the KL of samples of an older policy",
        "test_kl_losses_of_another_policy_need_its_ratio",
        "test_objective_exact::test_kl_estimators_of_whole_sequences",
    ),
    shown("the KL is clamped and precise", "test_kl_is_clamped_and_precise"),
    shown(
        "in the reward the KL is detached, and never in both places",
        "test_kl_in_the_reward_is_detached_and_per_token",
        "test_objective_exact::test_k1_in_the_reward_has_the_gradient_of_the_kl",
        "test_every_coefficient_changes_the_gradient",
        "test_objective_config::test_refuses_parts",
    ),
    shown(
        "one temperature for policy and reference",
        "test_rl_step::test_scores_of_answers_are_those_of_whole_rows",
        "test_rl_updates::test_at_first_the_policy_is_its_reference_at_any_temperature",
    ),
    shown("no penalty, no reference", "test_rl_updates::test_without_a_penalty_no_reference_is_kept"),
    shown(
        "entropy, and what keeps it",
        "test_entropy_is_of_the_whole_distribution_and_can_be_differentiated",
        "test_high_entropy_tokens_are_chosen_over_the_batch_and_the_coefficient_adapts",
        "test_rl_updates::test_the_entropy_bonus_rises_below_its_target_and_continues_with_a_run",
        left_out="clip-cov and KL-cov, which choose tokens by a covariance of advantage and log-probability: the upper bound "
        "of the ratio, the adaptive bonus and the choice of tokens by entropy are there for the same purpose",
    ),
    shown(
        "the entropy bonus has its normaliser",
        "test_components_have_normalisers_of_their_own",
        "test_entropy_is_of_the_whole_distribution_and_can_be_differentiated",
    ),
    shown(
        "what is watched",
        "test_rl::test_the_first_update_is_on_policy_and_the_run_ends_with_a_result",
        "test_objective_golden::test_pass_at_k_is_that_of_the_binomials",
        "test_lengths_of_right_and_wrong_answers_are_apart",
    ),
    shown("a start that can be learned from", left_out="a choice of each study, which reports pass@1 of what it begins with"),
    shown("a reward for form alone cannot be farmed", "test_rewards::test_form_cannot_be_farmed"),
    shown(
        "verifiers are strict, and no problem is trained on and evaluated",
        "test_tasks_answers::test_extract",
        "test_tasks_answers::test_an_answer_that_was_wrapped_is_found_or_refused_never_changed",
        "test_tasks_procedural::test_no_problem_is_trained_on_and_evaluated",
    ),
    shown(
        "schedules of the learning rate", "test_optimizer::test_schedule_values", left_out="its value is a choice of each run"
    ),
    shown(
        "seeds and error bars", "test_study::test_mean_and_error", "test_study::test_the_learning_curves_are_those_of_the_runs"
    ),
    shown(
        "what a step is",
        "test_rl_updates::test_each_pass_goes_over_all_rows_in_an_order_of_its_own",
        "test_rl_updates::test_the_first_minibatch_has_ratio_1_and_later_ones_do_not",
    ),
    shown(
        "REINFORCE, its returns and baselines",
        "test_ema_baseline_is_of_earlier_returns_and_not_of_its_own_batch",
        "test_ema_baseline_is_of_returns_and_not_of_bare_rewards",
        "test_the_batch_baseline_is_the_mean_return_of_what_was_judged",
        "test_rl_rewards::test_the_greedy_baseline_is_the_reward_of_the_most_likely_answer",
        "test_kl_in_the_reward_is_detached_and_per_token",
        "test_whitening_is_over_the_mask_and_may_keep_the_mean",
        "test_objective_exact::test_expected_gradient_is_that_of_the_expected_reward",
        "test_objective_exact::test_reaches_the_closed_form_optimum",
        "test_objective_trl::test_rloo_gradient",
    ),
]

A2 = [
    shown("the score is given at the stop token", "test_score_is_added_at_the_stop_token_not_at_the_last_column"),
    shown(
        "advantages end at the last action, which is terminal",
        "test_gae_passes_over_observations_and_ends_at_the_stop_token",
        "test_objective_golden::test_golden_value",
    ),
    shown("advantages pass over what a tool wrote", "test_gae_passes_over_observations_and_ends_at_the_stop_token"),
    shown(
        "returns before whitening; whitened rewards",
        "test_returns_are_made_before_advantages_are_whitened",
        "test_whitening_is_over_the_mask_and_may_keep_the_mean",
        "test_whitened_rewards_keep_their_mean_and_are_what_returns_are_of",
    ),
    shown("the clipped value loss", "test_value_loss_is_the_larger_of_both"),
    shown(
        "the value head begins at zero",
        "test_the_scalar_head_is_zero_at_first_without_bias_and_computed_in_float32",
        "test_rl_updates::test_a_new_value_head_explains_nothing_rather_than_less",
        left_out="beginning with a reward model's head, and steps for the values alone: a head of zeros is unbiased, and one "
        "trunk is shared",
    ),
    shown("a value is of the state before its token", "test_rollouts::test_a_value_is_of_the_state_before_its_token"),
    shown(
        "minibatches are shuffled in each pass, and the first has ratio 1",
        "test_rl_updates::test_each_pass_goes_over_all_rows_in_an_order_of_its_own",
        "test_rl_updates::test_the_first_minibatch_has_ratio_1_and_later_ones_do_not",
    ),
    shown(
        "lambda",
        "test_gae_with_lambda_1_is_monte_carlo_and_with_0_one_step",
        "test_lambda_adapts_to_the_length_of_an_answer_in_advantages_alone",
    ),
    shown(
        "updates end at a limit of the KL; what is watched",
        "test_rl_updates::test_a_large_kl_ends_the_updates_of_a_batch",
        "test_ppo_tells_its_values_and_how_often_each_clip_bites",
        "test_explained_variance_is_0_for_zeros_and_constants_and_1_for_the_returns",
    ),
    shown(
        "a penalty without a stop token, and nothing after it",
        "test_truncated_samples_are_kept_zeroed_or_penalised",
        "test_rl_step::test_the_stop_token_is_an_action_and_the_prompt_and_padding_are_not",
    ),
    shown("padding is masked, whatever it holds", "test_objective_invariance::test_every_loss_is_finite_though_padding_is_not"),
    shown(
        "the coefficient of the KL follows its target",
        "test_adaptive_kl_coefficient_is_proportional_and_bounded",
        "test_rl_updates::test_the_penalty_in_the_reward_follows_its_target_and_stays_positive",
    ),
    shown("PPO is right", "test_objective_exact::test_reaches_the_closed_form_optimum"),
]

A3 = [
    shown(
        "DPO: plain, conservative, robust, hinge",
        "test_objective_golden::test_golden_value",
        "test_robust_dpo_is_unbiased_under_flipped_labels",
        "test_objective_trl::test_dpo_loss_and_gradient",
        "test_objective_trl::test_conservative_dpo_loss",
        "test_objective_exact::test_dpo_reaches_the_closed_form_optimum",
    ),
    shown(
        "IPO is per token, and its beta a margin",
        "test_objective_golden::test_golden_value",
        "test_lengths_matter_to_averaged_losses_only",
        "test_objective_config::test_refuses_parts",
        "test_objective_trl::test_dpo_loss_and_gradient",
    ),
    shown(
        "SimPO, ORPO, CPO, length-normalised DPO",
        "test_objective_golden::test_golden_value",
        "test_log1mexp_is_stable_with_its_gradient",
        "test_lengths_matter_to_averaged_losses_only",
        "test_objective_trl::test_cpo_and_simpo_losses",
        "test_objective_trl::test_orpo_loss",
        left_out="LD-DPO, APO, EXO, NCA, SPPO, AOT, DiscoPOP, WPO: losses of the same four sums, none of which a run here uses",
    ),
]

A3_4 = [
    shown(
        "one prompt, cut from its answers at a token boundary",
        "test_chat_encoder::test_answers_to_one_prompt_share_its_ids",
        "test_chat_encoder::test_a_token_never_reaches_from_the_prompt_into_the_answer",
    ),
    shown(
        "sums are over answers with their stop token",
        "test_pair_sums_are_over_answers_alone",
        "test_chat_encoder::test_the_trained_tokens_are_the_assistants_and_their_stop_token",
    ),
    shown(
        "the reference is scored as the policy is",
        "test_preferences::test_dpo_begins_at_log_2_learns_and_continues_to_the_same_bits",
        "test_preferences::test_another_reference_is_refused_when_a_run_continues",
        left_out="scores of the reference that are kept: each update makes them anew, so that none can be of other data",
    ),
    shown("no dropout", left_out="no network here has dropout"),
    shown(
        "what is too long is left out and counted, never cut",
        "test_chat_rows::test_bad_examples_are_left_out_named_and_counted",
    ),
    shown(
        "identical pairs are left out",
        "test_chat_layouts::test_a_bad_example_is_refused_under_a_reason",
        "test_chat_rows::test_bad_examples_are_left_out_named_and_counted",
    ),
    shown(
        "rewards and log-probabilities are reported; a likelihood term",
        "test_dpo_begins_at_log_2_with_accuracy_one_half",
        "test_objective_golden::test_golden_value",
    ),
    shown(
        "at first log 2, and a tie is half right", "test_dpo_begins_at_log_2_with_accuracy_one_half", "test_a_tie_is_half_right"
    ),
    shown(
        "answers of a pair do not see each other",
        "test_preferences::test_gradients_through_packed_rows_are_those_of_answers_alone",
    ),
    shown(
        "the normaliser is the number of pairs",
        "test_preferences::test_micro_batches_change_nothing",
        "test_preferences::test_eight_devices_do_what_one_does",
        "test_preferences::test_held_out_scores_are_per_pair_whatever_the_batches",
    ),
]

A4 = [
    shown(
        "the loss, and its reference point",
        "test_objective_golden::test_golden_value",
        "test_kto_reference_point_is_a_mean_detached_and_not_negative",
        "test_objective_trl::test_kto_loss_and_gradient",
    ),
    shown(
        "answers to other prompts, one reference point, empty classes, weights of classes",
        "test_chat_rows::test_a_labelled_answer_comes_with_one_to_another_prompt",
        "test_preferences::test_micro_batches_change_nothing",
        "test_preferences::test_answers_of_one_class_alone_have_finite_metrics_and_gradients",
        "test_kto_weighs_classes_by_their_numbers",
        "test_kto_begins_at_half_the_class_weight",
    ),
]

A5 = [
    shown(
        "read at the stop token; its head; its loss",
        "test_reward_is_read_at_the_stop_token_wherever_an_answer_lies",
        "test_the_scalar_head_is_zero_at_first_without_bias_and_computed_in_float32",
        "test_bradley_terry_begins_at_log_2_and_centring_removes_the_free_constant",
        "test_objective_golden::test_golden_value",
        "test_objective_trl::test_reward_model_loss",
        "test_preferences::test_a_reward_model_learns_a_rule_and_scores_samples_as_it_scored_answers",
    ),
    shown(
        "accuracy on held-out pairs; whether scores go with lengths",
        "test_preferences::test_held_out_scores_are_per_pair_whatever_the_batches",
        "test_scores_that_go_with_lengths_are_told",
        "test_a_tie_is_half_right",
        "test_chat_layouts::test_a_bad_example_is_refused_under_a_reason",
        left_out="subtracting the scores' mean after training: the loss centres them, and a baseline takes a constant away",
    ),
    shown("rankings of more than two", left_out="data are pairs; a ranking can be written as all of its pairs"),
    shown(
        "over-optimisation",
        "test_study::test_reward_models_are_compared_on_pairs_that_none_of_them_learns_from",
        "test_study::test_the_exact_frontier_is_that_of_all_distributions_over_the_strings",
    ),
    shown(
        "outcome and process models",
        "test_outcome_and_process_losses_are_cross_entropies_where_there_are_labels",
        "test_steps_are_put_together_by_minimum_product_or_the_last",
        "test_preferences::test_an_outcome_model_of_all_tokens_judges_after_each_that_is_written",
        "test_process_model::test_a_label_stands_where_the_last_token_of_its_step_is_read",
        "test_process_model::test_the_loss_is_the_cross_entropy_of_the_labelled_steps_alone",
        "test_synthesis::test_the_best_of_n_is_that_by_a_reward_model",
        left_out="best of n against a majority vote: a study of its own",
    ),
]

SECTIONS = {"A1": A1, "A2": A2, "A3": A3, "A3.4": A3_4, "A4": A4, "A5": A5}
NUMBERED = {"A1": 44, "A2": 14, "A3": 3, "A3.4": 10, "A4": 2, "A5": 5}
ROWS = [
    pytest.param(detail, id=f"{section}.{number}")
    for section, rows in SECTIONS.items()
    for number, detail in enumerate(rows, start=1)
]


@pytest.fixture(scope="module")
def existing():
    """Of all tests, file::test, without importing them."""
    return {
        f"{path.stem}::{node.name}"
        for path in Path(__file__).parents[1].rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_detail_has_a_row():
    """In the order of the list; A1 ends with what is peculiar to REINFORCE."""
    assert {section: len(rows) for section, rows in SECTIONS.items()} == NUMBERED


@pytest.mark.parametrize("detail", ROWS)
def test_a_detail_is_shown_by_tests_that_exist_or_left_out_with_a_reason(detail, existing):
    assert detail.tests or detail.left_out
    assert set(detail.tests) <= existing
