// A batch of trajectories as flat arrays.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "row_layout.h"
#include "trajectory_view.h"

namespace archer_fast {

struct PackedSizes {
  std::int64_t num_trajectories = 0;  // B
  std::int64_t num_turns = 0;         // N
  std::int64_t num_tokens = 0;        // T
  std::int64_t max_length = 0;        // tokens of the longest
};

// Destinations of a collation; archer_fast/packing.py explains each and shows an example. Trajectories lie end to end,
// or, with padding, one in a line: then T here is B * width, and the places between hold pad_token_id, 0, -1 (of
// turn_ids), false and 0. Positions count places. cu_seqlens are sums of lengths in both.
// Owner: the caller; nothing is kept.
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
  std::span<bool> attention_mask;            // [T], true at tokens; without padding not written

  // Calls visit(name, array, length it has to have, whether that is T) for each array, in this order.
  template <class Arrays, class Visit>
  static void for_each(Arrays& arrays, const PackedSizes& sizes, const std::optional<Padding>& padding, Visit&& visit) {
    const auto [b, n, num_tokens, max_length] = sizes;
    const std::int64_t t = RowLayout::num_places(b, num_tokens, padding);
    visit("input_ids", arrays.input_ids, t, true);
    visit("position_ids", arrays.position_ids, t, true);
    visit("cu_seqlens", arrays.cu_seqlens, b + 1, false);
    visit("turn_ids", arrays.turn_ids, t, true);
    visit("action_mask", arrays.action_mask, t, true);
    visit("cu_turns", arrays.cu_turns, b + 1, false);
    visit("state_positions", arrays.state_positions, n, false);
    visit("action_positions", arrays.action_positions, n, false);
    visit("final_positions", arrays.final_positions, b, false);
    visit("turn", arrays.turn, n, false);
    visit("rewards", arrays.rewards, n, false);
    visit("returns", arrays.returns, n, false);
    visit("policy_versions", arrays.policy_versions, n, false);
    visit("terminated", arrays.terminated, b, false);
    visit("truncated", arrays.truncated, b, false);
    visit("rollout_logprobs", arrays.rollout_logprobs, t, true);
    if (padding) visit("attention_mask", arrays.attention_mask, t, true);
  }

  // Throws std::invalid_argument that names the array, the length wanted and the length that came.
  void check(const PackedSizes& sizes, const std::optional<Padding>& padding) const;
};

// Throws std::invalid_argument where the batch has more tokens than int32 offsets can say.
PackedSizes packed_sizes(std::span<const TrajectoryView> trajectories);

// Writes every element of every array, on up to `threads` threads where there is enough to write. Pure: no lock.
// Precondition: padding->check and out.check(packed_sizes(trajectories), padding) pass.
void collate(std::span<const TrajectoryView> trajectories, const std::optional<Padding>& padding, int threads,
             const PackedArrays& out) noexcept;

}  // namespace archer_fast
