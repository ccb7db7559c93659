#include "buffer_state.h"

#include <cstddef>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "concat.h"
#include "turn_priorities.h"

namespace archer_fast {
namespace {

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
  options.check();
  check_id("first_trajectory_id", first_trajectory_id);
  check_id("first_turn_id", first_turn_id);
  columns().check();
  if (priorities.size() != rewards.size()) {
    throw std::invalid_argument(concat("priorities: wanted ", rewards.size(), " items, got ", priorities.size()));
  }
  check_priorities(priorities, max_priority);
  if (std::ssize(tokens) > options.max_tokens) {
    throw std::invalid_argument(
        concat("tokens: wanted at most max_tokens = ", options.max_tokens, ", got ", tokens.size()));
  }
  if (std::ssize(num_turns) > options.max_trajectories) {
    throw std::invalid_argument(concat("num_turns: wanted at most max_trajectories = ", options.max_trajectories,
                                       " items, got ", num_turns.size()));
  }
}

TrajectoryColumns BufferState::columns() const noexcept {
  return {.tokens = tokens,
          .num_tokens = num_tokens,
          .num_turns = num_turns,
          .observation_lengths = observation_lengths,
          .action_lengths = action_lengths,
          .rollout_logprobs = rollout_logprobs,
          .rewards = rewards,
          .policy_versions = policy_versions,
          .terminated = terminated,
          .truncated = truncated,
          .task_ids = task_ids};
}

}  // namespace archer_fast
