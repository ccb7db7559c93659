#include "buffer_state.h"

#include <cstddef>
#include <limits>
#include <stdexcept>

#include "concat.h"
#include "turn_priorities.h"

namespace archer_fast {
namespace {

void check_length(const char* name, std::size_t length, std::int64_t wanted) {
  if (length != static_cast<std::size_t>(wanted)) {
    throw std::invalid_argument(concat(name, ": wanted ", wanted, " items, got ", length));
  }
}

std::int64_t checked_sum(const char* name, const std::vector<std::int32_t>& counts) {
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 1) throw std::invalid_argument(concat(name, "[", i, "]: wanted at least 1, got ", counts[i]));
    sum += counts[i];
  }
  return sum;
}

void check_flags(const char* name, const std::vector<std::uint8_t>& flags) {
  for (std::size_t i = 0; i < flags.size(); ++i) {
    if (flags[i] > 1) throw std::invalid_argument(concat(name, "[", i, "]: wanted 0 or 1, got ", int{flags[i]}));
  }
}

void check_id(const char* name, std::int64_t id) {
  // Half the range is left for ids to come.
  constexpr std::int64_t kMaxId = std::numeric_limits<std::int64_t>::max() / 2;
  if (id < 0 || id > kMaxId) throw std::invalid_argument(concat(name, ": wanted 0 to ", kMaxId, ", got ", id));
}

void check_priorities(const std::vector<double>& priorities, double max_priority) {
  if (!(max_priority >= TurnPriorities::kFirst && max_priority <= TurnPriorities::kMax)) {
    throw std::invalid_argument(
        concat("max_priority: wanted ", TurnPriorities::kFirst, " to ", TurnPriorities::kMax, ", got ", max_priority));
  }
  for (std::size_t i = 0; i < priorities.size(); ++i) {
    if (!(priorities[i] >= 0.0 && priorities[i] <= max_priority)) {
      throw std::invalid_argument(
          concat("priorities[", i, "]: wanted 0 to max_priority = ", max_priority, ", got ", priorities[i]));
    }
  }
}

}  // namespace

void BufferState::check() const {
  check_id("first_trajectory_id", first_trajectory_id);
  check_id("first_turn_id", first_turn_id);
  const auto num_trajectories = static_cast<std::int64_t>(num_turns.size());
  check_length("num_tokens", num_tokens.size(), num_trajectories);
  check_length("terminated", terminated.size(), num_trajectories);
  check_length("truncated", truncated.size(), num_trajectories);
  check_length("task_ids", task_ids.size(), num_trajectories);
  check_flags("terminated", terminated);
  check_flags("truncated", truncated);

  const std::int64_t total_turns = checked_sum("num_turns", num_turns);
  check_length("observation_lengths", observation_lengths.size(), total_turns);
  check_length("action_lengths", action_lengths.size(), total_turns);
  check_length("rewards", rewards.size(), total_turns);
  check_length("policy_versions", policy_versions.size(), total_turns);
  check_length("priorities", priorities.size(), total_turns);
  check_priorities(priorities, max_priority);

  const std::int64_t total_tokens = checked_sum("num_tokens", num_tokens);
  check_length("tokens", tokens.size(), total_tokens);
  check_length("rollout_logprobs", rollout_logprobs.size(), checked_sum("action_lengths", action_lengths));

  if (total_tokens > max_tokens) {
    throw std::invalid_argument(concat("tokens: wanted at most max_tokens = ", max_tokens, ", got ", total_tokens));
  }
  if (num_trajectories > max_trajectories) {
    throw std::invalid_argument(
        concat("num_turns: wanted at most max_trajectories = ", max_trajectories, " items, got ", num_trajectories));
  }
}

}  // namespace archer_fast
