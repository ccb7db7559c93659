// All that a TrajectoryBuffer must remember to go on as if it had never stopped.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer_options.h"
#include "trajectory_columns.h"

namespace archer_fast {

// Live trajectories oldest first, their turns end to end. B trajectories, N turns, T tokens, A action
// tokens. A plain value: who holds it owns it. Booleans are bytes of 0 or 1.
struct BufferState {
  BufferOptions options;
  std::uint64_t counter = 0;             // words the generator has drawn
  std::int64_t first_trajectory_id = 0;  // of the oldest live trajectory; as many were evicted
  std::int64_t first_turn_id = 0;        // of its first turn
  double max_priority = 1.0;             // largest that any turn ever had: what the next turns start with

  std::vector<std::int32_t> tokens;               // [T]
  std::vector<float> rollout_logprobs;            // [A]
  std::vector<std::int32_t> observation_lengths;  // [N]
  std::vector<std::int32_t> action_lengths;       // [N]
  std::vector<float> rewards;                     // [N]
  std::vector<std::int64_t> policy_versions;      // [N]
  std::vector<double> priorities;                 // [N]
  std::vector<std::int32_t> num_tokens;           // [B]
  std::vector<std::int32_t> num_turns;            // [B]
  std::vector<std::uint8_t> terminated;           // [B]
  std::vector<std::uint8_t> truncated;            // [B]
  std::vector<std::int32_t> task_ids;             // [B]

  // Throws std::invalid_argument that names the field where sizes, sums or bounds disagree. What lies
  // inside one trajectory is checked by NewTrajectory::check.
  void check() const;

  TrajectoryColumns columns() const noexcept;  // views of the trajectories here
};

}  // namespace archer_fast
