// Many trajectories, column by column.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "new_trajectory.h"

namespace archer_fast {

// B trajectories end to end, their N turns end to end, T tokens and A action tokens of all of them. What a field
// holds of one trajectory is what NewTrajectory says of it.
//
// Owner: the caller; nothing is kept past the call it is given to.
struct TrajectoryColumns {
  std::span<const std::int32_t> tokens;               // [T]
  std::span<const std::int32_t> num_tokens;           // [B]
  std::span<const std::int32_t> num_turns;            // [B]
  std::span<const std::int32_t> observation_lengths;  // [N]
  std::span<const std::int32_t> action_lengths;       // [N]
  std::span<const float> rollout_logprobs;            // [A]
  std::span<const float> rewards;                     // [N]
  std::span<const std::int64_t> policy_versions;      // [N]
  std::span<const std::uint8_t> terminated;           // [B], 0 or 1
  std::span<const std::uint8_t> truncated;            // [B], 0 or 1
  std::span<const std::int32_t> task_ids;             // [B]

  std::size_t size() const noexcept { return num_turns.size(); }  // B

  // Throws std::invalid_argument that names the field where lengths and sums disagree. What lies inside a
  // trajectory is checked by NewTrajectory::check. O(B + N).
  void check() const;
};

// Goes through the trajectories in their order. Precondition: columns.check() passes.
class TrajectoryReader {
 public:
  explicit TrajectoryReader(const TrajectoryColumns& columns) noexcept : columns_(columns) {}

  // The next trajectory. Precondition: there is one. O(N) of its turns.
  NewTrajectory next() noexcept;

 private:
  const TrajectoryColumns& columns_;
  std::size_t trajectory_ = 0, turn_ = 0, token_ = 0, action_token_ = 0;
};

}  // namespace archer_fast
