#include "packed_arrays.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {
namespace {

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

std::int32_t narrow(std::int64_t value) { return static_cast<std::int32_t>(value); }

void check_length(const char* name, std::size_t length, std::int64_t wanted) {
  if (length != index(wanted)) {
    throw std::invalid_argument(concat(name, ": wanted length ", wanted, ", got ", length));
  }
}

// Where the next trajectory goes.
struct Cursor {
  std::int64_t token = 0;
  std::int64_t turn = 0;
};

void write_turn(const TrajectoryView& trajectory, std::size_t turn, const float* logprobs, Cursor at,
                const PackedArrays& out) {
  const TurnRecord& record = trajectory.turns[turn];
  const bool is_last = turn + 1 == trajectory.turns.size();
  const std::int64_t observation_begin = at.token + trajectory.observation_begin(turn);
  const std::int64_t action_begin = at.token + record.action_begin;
  const std::int64_t action_end = at.token + record.action_end;
  const std::int64_t owned_end = is_last ? at.token + trajectory.tokens.size() : action_end;
  const std::int64_t row = at.turn + static_cast<std::int64_t>(turn);

  std::fill(&out.turn_ids[index(observation_begin)], out.turn_ids.data() + owned_end, narrow(row));

  bool* const mask = out.action_mask.data();
  std::fill(mask + observation_begin, mask + action_begin, false);
  std::fill(mask + action_begin, mask + action_end, true);
  std::fill(mask + action_end, mask + owned_end, false);

  float* const scores = out.rollout_logprobs.data();
  std::fill(scores + observation_begin, scores + action_begin, 0.0F);
  std::copy_n(logprobs, action_end - action_begin, scores + action_begin);
  std::fill(scores + action_end, scores + owned_end, 0.0F);

  out.state_positions[index(row)] = action_begin - 1;
  out.action_positions[index(row)] = action_end - 1;
  out.turn[index(row)] = narrow(static_cast<std::int64_t>(turn));
  out.rewards[index(row)] = record.reward;
  out.returns[index(row)] = record.monte_carlo_return;
  out.policy_versions[index(row)] = record.policy_version;
}

}  // namespace

void PackedArrays::check(const PackedSizes& sizes) const {
  const auto [num_trajectories, num_turns, num_tokens] = sizes;
  check_length("input_ids", input_ids.size(), num_tokens);
  check_length("position_ids", position_ids.size(), num_tokens);
  check_length("cu_seqlens", cu_seqlens.size(), num_trajectories + 1);
  check_length("turn_ids", turn_ids.size(), num_tokens);
  check_length("action_mask", action_mask.size(), num_tokens);
  check_length("cu_turns", cu_turns.size(), num_trajectories + 1);
  check_length("state_positions", state_positions.size(), num_turns);
  check_length("action_positions", action_positions.size(), num_turns);
  check_length("final_positions", final_positions.size(), num_trajectories);
  check_length("turn", turn.size(), num_turns);
  check_length("rewards", rewards.size(), num_turns);
  check_length("returns", returns.size(), num_turns);
  check_length("policy_versions", policy_versions.size(), num_turns);
  check_length("terminated", terminated.size(), num_trajectories);
  check_length("truncated", truncated.size(), num_trajectories);
  check_length("rollout_logprobs", rollout_logprobs.size(), num_tokens);
}

PackedSizes packed_sizes(std::span<const TrajectoryView> trajectories) {
  PackedSizes sizes;
  sizes.num_trajectories = std::ssize(trajectories);
  for (const TrajectoryView& trajectory : trajectories) {
    sizes.num_turns += std::ssize(trajectory.turns);
    sizes.num_tokens += trajectory.tokens.size();
  }
  constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  if (sizes.num_tokens > kMaxTokens) {
    throw std::invalid_argument(
        concat("trajectory_ids: wanted a batch of at most ", kMaxTokens, " tokens, got ", sizes.num_tokens));
  }
  return sizes;
}

void collate(std::span<const TrajectoryView> trajectories, const PackedArrays& out) noexcept {
  Cursor at;
  out.cu_seqlens[0] = 0;
  out.cu_turns[0] = 0;
  for (std::size_t i = 0; i < trajectories.size(); ++i) {
    const TrajectoryView& trajectory = trajectories[i];
    const std::int64_t end = at.token + trajectory.tokens.size();
    trajectory.tokens.copy(0, trajectory.tokens.size(), out.input_ids.data() + at.token);
    std::iota(out.position_ids.data() + at.token, out.position_ids.data() + end, 0);

    const float* logprobs = trajectory.rollout_logprobs.data();
    for (std::size_t turn = 0; turn < trajectory.turns.size(); ++turn) {
      write_turn(trajectory, turn, logprobs, at, out);
      logprobs += trajectory.turns[turn].num_action_tokens();
    }

    at.token = end;
    at.turn += std::ssize(trajectory.turns);
    out.cu_seqlens[i + 1] = narrow(at.token);
    out.cu_turns[i + 1] = narrow(at.turn);
    out.final_positions[i] = end - 1;
    out.terminated[i] = trajectory.terminated;
    out.truncated[i] = !trajectory.terminated;
  }
}

}  // namespace archer_fast
