// Whole trajectories, handed out in memory that the caller made.
#include <algorithm>
#include <optional>
#include <vector>

#include "operations.h"
#include "plain_rows.h"

namespace archer_fast::fuzzing {
namespace {

std::int64_t index(std::size_t place) { return static_cast<std::int64_t>(place); }

// What archer_fast/packing.py and padding.py say the arrays of some trajectories are.
struct PlainPacked {
  std::vector<std::int32_t> input_ids, position_ids, cu_seqlens{0}, turn_ids, cu_turns{0}, turn;
  std::vector<std::int64_t> state_positions, action_positions, final_positions, policy_versions;
  std::vector<float> rewards, returns, rollout_logprobs;
  std::vector<bool> action_mask, terminated, truncated, attention_mask;

  void add(const PlainBuffer& plain, std::int64_t trajectory_id, PlainRows& rows, std::int32_t pad_token_id) {
    const PlainTrajectory& game = plain.game(trajectory_id);
    const std::int64_t begin = rows.next(game.tokens.size());
    const std::int64_t first_turn = plain.first_turn_of(trajectory_id);
    std::vector<std::int32_t> positions, owners;
    std::vector<bool> mask;
    std::vector<float> logprobs;
    for (std::size_t i = 0; i < game.rewards.size(); ++i) {
      const PlainTurn cuts = plain.turn(first_turn + static_cast<std::int64_t>(i));
      for (std::size_t t = cuts.observation_begin; t < (cuts.is_last ? game.tokens.size() : cuts.action_end); ++t) {
        const bool is_sampled = cuts.action_begin <= t && t < cuts.action_end;
        positions.push_back(static_cast<std::int32_t>(t));
        owners.push_back(static_cast<std::int32_t>(turn.size()));
        mask.push_back(is_sampled);
        logprobs.push_back(is_sampled ? game.rollout_logprobs[cuts.first_logprob + t - cuts.action_begin] : 0.0F);
      }
      turn.push_back(static_cast<std::int32_t>(i));
      state_positions.push_back(begin + static_cast<std::int64_t>(cuts.action_begin) - 1);
      action_positions.push_back(begin + static_cast<std::int64_t>(cuts.action_end) - 1);
      rewards.push_back(game.rewards[i]);
      returns.push_back(plain.returns(trajectory_id)[i]);
      policy_versions.push_back(game.policy_versions[i]);
    }
    rows.add(input_ids, game.tokens, pad_token_id);
    rows.add(position_ids, positions, 0);
    rows.add(turn_ids, owners, -1);
    rows.add(action_mask, mask, false);
    rows.add(rollout_logprobs, logprobs, 0.0F);
    rows.add_padded(attention_mask, std::vector<bool>(game.tokens.size(), true), false);
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<std::int32_t>(game.tokens.size()));
    cu_turns.push_back(static_cast<std::int32_t>(turn.size()));
    final_positions.push_back(begin + std::ssize(game.tokens) - 1);
    terminated.push_back(game.terminated);
    truncated.push_back(game.truncated);
  }
};

}  // namespace

void collate_trajectories(Bench& bench) {
  const Block<std::int64_t> ids = some_ids(bench.input, bench.plain.trajectory_range());
  const bool are_live = are_all_in(bench.plain.trajectory_range(), ids);
  TrajectoryPlan plan;
  require(goes_through([&] { plan = bench.buffer->plan(ids.span()); }) == are_live);

  std::size_t num_tokens = 0, num_turns = 0, max_length = 0;
  if (are_live) {
    for (const std::int64_t id : ids.span()) {
      const std::size_t length = bench.plain.game(id).tokens.size();
      num_tokens += length;
      num_turns += bench.plain.game(id).rewards.size();
      max_length = std::max(max_length, length);
    }
    const PackedSizes& sizes = plan.sizes;
    require(sizes.num_trajectories == std::ssize(ids.span()) && sizes.num_turns == index(num_turns) &&
            sizes.num_tokens == index(num_tokens) && sizes.max_length == index(max_length));
  }
  const std::optional<Padding> padding = some_padding(bench.input, max_length);
  const int threads = some_threads(bench.input);
  PlainPacked wanted;
  const bool is_wanted = are_live && fits(padding, ids.span().size(), max_length);
  if (is_wanted) {
    PlainRows rows(padding);
    for (const std::int64_t id : ids.span()) wanted.add(bench.plain, id, rows, padding ? padding->pad_token_id : 0);
  }
  Lengths length(bench.input);
  const Block<std::int32_t> input_ids(length(wanted.input_ids.size()));
  const Block<std::int32_t> position_ids(length(wanted.position_ids.size()));
  const Block<std::int32_t> cu_seqlens(length(wanted.cu_seqlens.size()));
  const Block<std::int32_t> turn_ids(length(wanted.turn_ids.size()));
  const Block<bool> action_mask(length(wanted.action_mask.size()));
  const Block<std::int32_t> cu_turns(length(wanted.cu_turns.size()));
  const Block<std::int64_t> state_positions(length(wanted.state_positions.size()));
  const Block<std::int64_t> action_positions(length(wanted.action_positions.size()));
  const Block<std::int64_t> final_positions(length(wanted.final_positions.size()));
  const Block<std::int32_t> turn(length(wanted.turn.size()));
  const Block<float> rewards(length(wanted.rewards.size()));
  const Block<float> returns(length(wanted.returns.size()));
  const Block<std::int64_t> policy_versions(length(wanted.policy_versions.size()));
  const Block<bool> terminated(length(wanted.terminated.size()));
  const Block<bool> truncated(length(wanted.truncated.size()));
  const Block<float> rollout_logprobs(length(wanted.rollout_logprobs.size()));
  const Block<bool> attention_mask(padding ? length(wanted.attention_mask.size()) : 0);
  const PackedArrays out{.input_ids = input_ids.span(),
                         .position_ids = position_ids.span(),
                         .cu_seqlens = cu_seqlens.span(),
                         .turn_ids = turn_ids.span(),
                         .action_mask = action_mask.span(),
                         .cu_turns = cu_turns.span(),
                         .state_positions = state_positions.span(),
                         .action_positions = action_positions.span(),
                         .final_positions = final_positions.span(),
                         .turn = turn.span(),
                         .rewards = rewards.span(),
                         .returns = returns.span(),
                         .policy_versions = policy_versions.span(),
                         .terminated = terminated.span(),
                         .truncated = truncated.span(),
                         .rollout_logprobs = rollout_logprobs.span(),
                         .attention_mask = attention_mask.span()};
  if (!are_live) return;
  evict_some(bench);
  const bool is_possible = is_wanted && length.are_right() && are_all_in(bench.plain.trajectory_range(), ids);
  require(goes_through([&] { bench.buffer->collate(plan, padding, threads, out); }) == is_possible);
  if (!is_possible) return;
  require(input_ids.holds(wanted.input_ids));
  require(position_ids.holds(wanted.position_ids));
  require(cu_seqlens.holds(wanted.cu_seqlens));
  require(turn_ids.holds(wanted.turn_ids));
  require(action_mask.holds(wanted.action_mask));
  require(cu_turns.holds(wanted.cu_turns));
  require(state_positions.holds(wanted.state_positions));
  require(action_positions.holds(wanted.action_positions));
  require(final_positions.holds(wanted.final_positions));
  require(turn.holds(wanted.turn));
  require(rewards.holds(wanted.rewards));
  require(returns.holds(wanted.returns));
  require(policy_versions.holds(wanted.policy_versions));
  require(terminated.holds(wanted.terminated));
  require(truncated.holds(wanted.truncated));
  require(rollout_logprobs.holds(wanted.rollout_logprobs));
  require(attention_mask.holds(wanted.attention_mask));
}

}  // namespace archer_fast::fuzzing
