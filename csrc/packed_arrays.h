// The packed batch: ragged trajectories end to end, never padded.
#pragma once

#include <cstdint>
#include <span>

#include "trajectory_view.h"

namespace archer_fast {

struct PackedSizes {
  std::int64_t num_trajectories = 0;  // B
  std::int64_t num_turns = 0;         // N
  std::int64_t num_tokens = 0;        // T
};

// Destinations of `collate`. archer_fast/packing.py is the specification of every field, with a worked
// example. Owner: the caller; the spans may not overlap.
struct PackedArrays {
  std::span<std::int32_t> input_ids;         // [T]
  std::span<std::int32_t> position_ids;      // [T]
  std::span<std::int32_t> cu_seqlens;        // [B + 1]
  std::span<std::int32_t> turn_ids;          // [T]
  std::span<bool> action_mask;               // [T]
  std::span<std::int32_t> cu_turns;          // [B + 1]
  std::span<std::int64_t> state_positions;   // [N]
  std::span<std::int64_t> action_positions;  // [N]
  std::span<std::int64_t> final_positions;   // [B]
  std::span<std::int32_t> turn;              // [N]
  std::span<float> rewards;                  // [N]
  std::span<float> returns;                  // [N]
  std::span<std::int64_t> policy_versions;   // [N]
  std::span<bool> terminated;                // [B]
  std::span<bool> truncated;                 // [B]
  std::span<float> rollout_logprobs;         // [T]

  // Throws std::invalid_argument that names the array, the length wanted and the length that came.
  void check(const PackedSizes& sizes) const;
};

// Throws std::invalid_argument where the batch has more tokens than int32 offsets can say.
PackedSizes packed_sizes(std::span<const TrajectoryView> trajectories);

// Writes every element of every array, in one pass over the trajectories. Pure: no lock, no allocation.
// Precondition: out.check(packed_sizes(trajectories)) passes.
void collate(std::span<const TrajectoryView> trajectories, const PackedArrays& out) noexcept;

}  // namespace archer_fast
