// Transitions, handed out in memory that the caller made.
#include <algorithm>
#include <optional>
#include <vector>

#include "operations.h"
#include "plain_rows.h"

namespace archer_fast::fuzzing {
namespace {

std::int64_t index(std::size_t place) { return static_cast<std::int64_t>(place); }

// What archer_fast/transitions.py and padding.py say the arrays of some transitions are.
struct PlainTransitions {
  std::vector<std::int32_t> input_ids, cu_seqlens{0}, turn, cu_actions{0};
  std::vector<std::int64_t> state_positions, action_positions, next_state_positions, policy_versions;
  std::vector<float> rewards, returns, rollout_logprobs;
  std::vector<bool> is_last, terminated, truncated, attention_mask, action_mask;

  void add(const PlainBuffer& plain, std::int64_t turn_id, PlainRows& rows, std::int32_t pad_token_id) {
    const PlainTurn cuts = plain.turn(turn_id);
    const PlainTrajectory& game = plain.game(cuts.trajectory_id);
    const std::size_t end = cuts.next_state_end;
    const std::int64_t begin = rows.next(end);
    std::vector<bool> mask;
    for (std::size_t t = 0; t < end; ++t) mask.push_back(cuts.action_begin <= t && t < cuts.action_end);
    for (std::size_t i = 0; i < cuts.action_end - cuts.action_begin; ++i) {
      rollout_logprobs.push_back(game.rollout_logprobs[cuts.first_logprob + i]);
    }
    rows.add(input_ids, std::vector(game.tokens.begin(), game.tokens.begin() + index(end)), pad_token_id);
    rows.add_padded(attention_mask, std::vector<bool>(end, true), false);
    rows.add_padded(action_mask, mask, false);
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<std::int32_t>(end));
    cu_actions.push_back(static_cast<std::int32_t>(rollout_logprobs.size()));
    state_positions.push_back(begin + index(cuts.action_begin) - 1);
    action_positions.push_back(begin + index(cuts.action_end) - 1);
    next_state_positions.push_back(begin + index(end) - 1);
    turn.push_back(static_cast<std::int32_t>(cuts.index));
    rewards.push_back(game.rewards[cuts.index]);
    returns.push_back(plain.returns(cuts.trajectory_id)[cuts.index]);
    policy_versions.push_back(game.policy_versions[cuts.index]);
    is_last.push_back(cuts.is_last);
    terminated.push_back(cuts.is_last && game.terminated);
    truncated.push_back(cuts.is_last && game.truncated);
  }
};

}  // namespace

void collate_transitions(Bench& bench) {
  const Block<std::int64_t> ids = some_ids(bench.input, bench.plain.turn_range());
  const bool are_live = are_all_in(bench.plain.turn_range(), ids);
  TransitionPlan plan;
  require(goes_through([&] { plan = bench.buffer->plan_transitions(ids.span()); }) == are_live);

  std::size_t num_tokens = 0, num_action_tokens = 0, max_length = 0;
  if (are_live) {
    for (const std::int64_t id : ids.span()) {
      const PlainTurn cuts = bench.plain.turn(id);
      num_tokens += cuts.next_state_end;
      num_action_tokens += cuts.action_end - cuts.action_begin;
      max_length = std::max(max_length, cuts.next_state_end);
    }
    const TransitionSizes& sizes = plan.sizes;
    require(sizes.num_transitions == std::ssize(ids.span()) && sizes.num_tokens == index(num_tokens) &&
            sizes.num_action_tokens == index(num_action_tokens) && sizes.max_length == index(max_length));
  }
  const std::optional<Padding> padding = some_padding(bench.input, max_length);
  const int threads = some_threads(bench.input);
  PlainTransitions wanted;
  const bool is_wanted = are_live && fits(padding, ids.span().size(), max_length);
  if (is_wanted) {
    PlainRows rows(padding);
    for (const std::int64_t id : ids.span()) wanted.add(bench.plain, id, rows, padding ? padding->pad_token_id : 0);
  }
  Lengths length(bench.input);
  const Block<std::int32_t> input_ids(length(wanted.input_ids.size()));
  const Block<std::int32_t> cu_seqlens(length(wanted.cu_seqlens.size()));
  const Block<std::int64_t> state_positions(length(wanted.state_positions.size()));
  const Block<std::int64_t> action_positions(length(wanted.action_positions.size()));
  const Block<std::int64_t> next_state_positions(length(wanted.next_state_positions.size()));
  const Block<std::int32_t> turn(length(wanted.turn.size()));
  const Block<float> rewards(length(wanted.rewards.size()));
  const Block<float> returns(length(wanted.returns.size()));
  const Block<std::int64_t> policy_versions(length(wanted.policy_versions.size()));
  const Block<bool> is_last(length(wanted.is_last.size()));
  const Block<bool> terminated(length(wanted.terminated.size()));
  const Block<bool> truncated(length(wanted.truncated.size()));
  const Block<float> rollout_logprobs(length(wanted.rollout_logprobs.size()));
  const Block<std::int32_t> cu_actions(length(wanted.cu_actions.size()));
  const Block<bool> attention_mask(padding ? length(wanted.attention_mask.size()) : 0);
  const Block<bool> action_mask(padding ? length(wanted.action_mask.size()) : 0);
  const TransitionArrays out{.input_ids = input_ids.span(),
                             .cu_seqlens = cu_seqlens.span(),
                             .state_positions = state_positions.span(),
                             .action_positions = action_positions.span(),
                             .next_state_positions = next_state_positions.span(),
                             .turn = turn.span(),
                             .rewards = rewards.span(),
                             .returns = returns.span(),
                             .policy_versions = policy_versions.span(),
                             .is_last = is_last.span(),
                             .terminated = terminated.span(),
                             .truncated = truncated.span(),
                             .rollout_logprobs = rollout_logprobs.span(),
                             .cu_actions = cu_actions.span(),
                             .attention_mask = attention_mask.span(),
                             .action_mask = action_mask.span()};
  if (!are_live) return;
  evict_some(bench);
  const bool is_possible = is_wanted && length.are_right() && are_all_in(bench.plain.turn_range(), ids);
  require(goes_through([&] { bench.buffer->collate(plan, padding, threads, out); }) == is_possible);
  if (!is_possible) return;
  require(input_ids.holds(wanted.input_ids));
  require(cu_seqlens.holds(wanted.cu_seqlens));
  require(state_positions.holds(wanted.state_positions));
  require(action_positions.holds(wanted.action_positions));
  require(next_state_positions.holds(wanted.next_state_positions));
  require(turn.holds(wanted.turn));
  require(rewards.holds(wanted.rewards));
  require(returns.holds(wanted.returns));
  require(policy_versions.holds(wanted.policy_versions));
  require(is_last.holds(wanted.is_last));
  require(terminated.holds(wanted.terminated));
  require(truncated.holds(wanted.truncated));
  require(rollout_logprobs.holds(wanted.rollout_logprobs));
  require(cu_actions.holds(wanted.cu_actions));
  require(attention_mask.holds(wanted.attention_mask));
  require(action_mask.holds(wanted.action_mask));
}

}  // namespace archer_fast::fuzzing
