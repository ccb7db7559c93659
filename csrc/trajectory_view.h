// A stored trajectory, read in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "token_span.h"

namespace archer_fast {

// One turn: its observation ends and its action begins at action_begin; the action ends at action_end, where the
// next observation begins. Places in the trajectory's own stream.
struct TurnRecord {
  std::int64_t policy_version;
  std::int32_t action_begin;
  std::int32_t action_end;
  float reward;
  float monte_carlo_return;  // reward + gamma * that of the next turn

  std::int32_t num_action_tokens() const noexcept { return action_end - action_begin; }
};

// Owner: the TrajectoryBuffer; valid while its lock is held, because eviction frees what it points to.
struct TrajectoryView {
  std::span<const TurnRecord> turns;        // [N], N >= 1
  TokenSpan tokens;                         // [T]
  std::span<const float> rollout_logprobs;  // [A], action tokens only
  bool terminated;                          // else truncated

  std::int32_t observation_begin(std::size_t turn) const noexcept { return turn == 0 ? 0 : turns[turn - 1].action_end; }

  // Where the observation after a turn's action ends: what the next action, if there is one, answers.
  std::int32_t next_state_end(std::size_t turn) const noexcept {
    return turn + 1 < turns.size() ? turns[turn + 1].action_begin : static_cast<std::int32_t>(tokens.size());
  }
};

}  // namespace archer_fast
