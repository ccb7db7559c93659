#include "new_trajectory.h"

#include <cmath>
#include <limits>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {
namespace {

void check_one_per_turn(const char* name, std::size_t size, std::size_t num_turns) {
  if (size != num_turns) {
    throw std::invalid_argument(concat(name, ": wanted one per turn (", num_turns, "), got ", size));
  }
}

std::int64_t checked_sum(const char* name, std::span<const std::int32_t> lengths) {
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 1) {
      throw std::invalid_argument(concat(name, "[", i, "]: wanted at least 1 token, got ", lengths[i]));
    }
    sum += lengths[i];
  }
  return sum;
}

void check_finite(const char* name, std::span<const float> values) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      throw std::invalid_argument(concat(name, "[", i, "]: wanted a finite number, got ", values[i]));
    }
  }
}

void check_token_ids(std::span<const std::int32_t> tokens) {
  std::int32_t sign = 0;
  for (const std::int32_t token : tokens) sign |= token;  // no exit inside: this loop vectorises
  if (sign >= 0) return;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0) {
      throw std::invalid_argument(concat("tokens[", i, "]: wanted a token id of 0 or more, got ", tokens[i]));
    }
  }
}

}  // namespace

void NewTrajectory::check() const {
  const std::size_t num_turns = observation_lengths.size();
  if (num_turns == 0) throw std::invalid_argument("observation_lengths: wanted at least one turn, got none");
  check_one_per_turn("action_lengths", action_lengths.size(), num_turns);
  check_one_per_turn("rewards", rewards.size(), num_turns);
  check_one_per_turn("policy_versions", policy_versions.size(), num_turns);

  constexpr auto kMaxTokens = static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max());
  if (tokens.size() > kMaxTokens) {
    throw std::invalid_argument(concat("tokens: wanted at most ", kMaxTokens, ", got ", tokens.size()));
  }
  const std::int64_t num_observed = checked_sum("observation_lengths", observation_lengths);
  const std::int64_t num_sampled = checked_sum("action_lengths", action_lengths);
  if (num_observed + num_sampled > static_cast<std::int64_t>(tokens.size())) {
    throw std::invalid_argument(concat("tokens: wanted at least observation_lengths + action_lengths = ",
                                       num_observed + num_sampled, ", got ", tokens.size()));
  }
  if (static_cast<std::int64_t>(rollout_logprobs.size()) != num_sampled) {
    throw std::invalid_argument(
        concat("rollout_logprobs: wanted one per action token (", num_sampled, "), got ", rollout_logprobs.size()));
  }
  if (terminated == truncated) {
    throw std::invalid_argument(concat("terminated, truncated: wanted exactly one true, got terminated=", terminated,
                                       ", truncated=", truncated));
  }
  check_token_ids(tokens);
  check_finite("rewards", rewards);
  check_finite("rollout_logprobs", rollout_logprobs);
}

}  // namespace archer_fast
