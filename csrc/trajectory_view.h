// A stored trajectory, read in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "token_span.h"

namespace archer_fast {

// One turn. Places are in the trajectory's own streams, so that two records say all of a turn, wherever it stands.
struct TurnRecord {
  std::int64_t policy_version;
  std::int32_t action_begin;   // of its tokens: there the observation ends
  std::int32_t first_logprob;  // of its rollout_logprobs
  float reward;
  float monte_carlo_return;  // reward + gamma * that of the next turn
};

// Owner: the TrajectoryBuffer; valid while its lock is held, because eviction frees what it points to.
struct TrajectoryView {
  std::span<const TurnRecord> turns;        // [N], N >= 1
  TokenSpan tokens;                         // [T]
  std::span<const float> rollout_logprobs;  // [A], action tokens only
  bool terminated;                          // else truncated

  std::int32_t num_action_tokens(std::size_t turn) const noexcept {
    const bool is_last = turn + 1 == turns.size();
    const auto end = is_last ? static_cast<std::int32_t>(rollout_logprobs.size()) : turns[turn + 1].first_logprob;
    return end - turns[turn].first_logprob;
  }

  // Where the action ends, and the next observation begins.
  std::int32_t action_end(std::size_t turn) const noexcept {
    return turns[turn].action_begin + num_action_tokens(turn);
  }

  std::int32_t observation_begin(std::size_t turn) const noexcept { return turn == 0 ? 0 : action_end(turn - 1); }

  // Where the observation after a turn's action ends: what the next action, if there is one, answers.
  std::int32_t next_state_end(std::size_t turn) const noexcept {
    return turn + 1 < turns.size() ? turns[turn + 1].action_begin : static_cast<std::int32_t>(tokens.size());
  }
};

}  // namespace archer_fast
