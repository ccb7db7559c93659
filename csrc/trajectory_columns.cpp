#include "trajectory_columns.h"

#include <numeric>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {
namespace {

void check_length(const char* name, std::size_t length, std::size_t wanted) {
  if (length != wanted) throw std::invalid_argument(concat(name, ": wanted ", wanted, " items, got ", length));
}

std::size_t checked_sum(const char* name, std::span<const std::int32_t> counts) {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 1) throw std::invalid_argument(concat(name, "[", i, "]: wanted at least 1, got ", counts[i]));
    sum += static_cast<std::size_t>(counts[i]);
  }
  return sum;
}

void check_flags(const char* name, std::span<const std::uint8_t> flags) {
  for (std::size_t i = 0; i < flags.size(); ++i) {
    if (flags[i] > 1) throw std::invalid_argument(concat(name, "[", i, "]: wanted 0 or 1, got ", int{flags[i]}));
  }
}

}  // namespace

void TrajectoryColumns::check() const {
  check_length("num_tokens", num_tokens.size(), size());
  check_length("terminated", terminated.size(), size());
  check_length("truncated", truncated.size(), size());
  check_length("task_ids", task_ids.size(), size());
  check_flags("terminated", terminated);
  check_flags("truncated", truncated);

  const std::size_t total_turns = checked_sum("num_turns", num_turns);
  check_length("observation_lengths", observation_lengths.size(), total_turns);
  check_length("action_lengths", action_lengths.size(), total_turns);
  check_length("rewards", rewards.size(), total_turns);
  check_length("policy_versions", policy_versions.size(), total_turns);

  check_length("tokens", tokens.size(), checked_sum("num_tokens", num_tokens));
  check_length("rollout_logprobs", rollout_logprobs.size(), checked_sum("action_lengths", action_lengths));
}

NewTrajectory TrajectoryReader::next() noexcept {
  const auto num_turns = static_cast<std::size_t>(columns_.num_turns[trajectory_]);
  const auto num_tokens = static_cast<std::size_t>(columns_.num_tokens[trajectory_]);
  const std::span action_lengths = columns_.action_lengths.subspan(turn_, num_turns);
  const auto num_sampled = std::accumulate(action_lengths.begin(), action_lengths.end(), std::size_t{0});
  const NewTrajectory trajectory{.tokens = columns_.tokens.subspan(token_, num_tokens),
                                 .observation_lengths = columns_.observation_lengths.subspan(turn_, num_turns),
                                 .action_lengths = action_lengths,
                                 .rollout_logprobs = columns_.rollout_logprobs.subspan(action_token_, num_sampled),
                                 .rewards = columns_.rewards.subspan(turn_, num_turns),
                                 .policy_versions = columns_.policy_versions.subspan(turn_, num_turns),
                                 .terminated = columns_.terminated[trajectory_] != 0,
                                 .truncated = columns_.truncated[trajectory_] != 0,
                                 .task_id = columns_.task_ids[trajectory_]};
  ++trajectory_;
  turn_ += num_turns;
  token_ += num_tokens;
  action_token_ += num_sampled;
  return trajectory;
}

}  // namespace archer_fast
