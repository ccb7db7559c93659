#include "new_trajectory.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
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

}  // namespace

void check_finite(const char* name, std::span<const float> values) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      throw std::invalid_argument(concat(name, "[", i, "]: wanted a finite number, got ", values[i]));
    }
  }
}

void check_token_ids(const char* name, std::span<const std::int32_t> tokens, std::int64_t vocab_size) {
  constexpr std::uint32_t kEndOfInt32 = std::uint32_t{1} << 31;
  const std::uint32_t end = vocab_size > 0 ? static_cast<std::uint32_t>(vocab_size) : kEndOfInt32;
  std::uint32_t largest = 0;  // a negative id is larger than any other; no exit inside: this loop vectorises
  for (const std::int32_t token : tokens) largest = std::max(largest, static_cast<std::uint32_t>(token));
  if (largest < end) return;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (static_cast<std::uint32_t>(tokens[i]) < end) continue;
    if (tokens[i] < 0) {
      throw std::invalid_argument(concat(name, "[", i, "]: wanted a token id of 0 or more, got ", tokens[i]));
    }
    throw std::invalid_argument(
        concat(name, "[", i, "]: wanted a token id below vocab_size = ", vocab_size, ", got ", tokens[i]));
  }
}

void NewTrajectory::check(std::int64_t vocab_size) const {
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
  check_token_ids("tokens", tokens, vocab_size);
  check_finite("rewards", rewards);
  check_finite("rollout_logprobs", rollout_logprobs);
}

}  // namespace archer_fast
