// A stored trajectory, read in place.
#pragma once

#include <cstdint>
#include <span>

namespace archer_fast {

// One turn: observation [observation_begin, action_begin) and action [action_begin, action_end) of the
// trajectory's own stream.
struct TurnRecord {
  std::int64_t policy_version;
  std::int32_t observation_begin;
  std::int32_t action_begin;
  std::int32_t action_end;
  float reward;
};

// Owner: the TrajectoryBuffer; valid while its lock is held, because eviction frees what it points to.
struct TrajectoryView {
  std::span<const TurnRecord> turns;        // [N], N >= 1
  std::span<const std::int32_t> tokens;     // [T]
  std::span<const float> rollout_logprobs;  // [A], action tokens only
  bool terminated;                          // else truncated
};

}  // namespace archer_fast
