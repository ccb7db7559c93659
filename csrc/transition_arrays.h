// A batch of transitions as flat arrays.
#pragma once

#include <cstdint>
#include <iterator>
#include <optional>
#include <span>

#include "row_layout.h"
#include "trajectory_view.h"

namespace archer_fast {

// One turn with all that came before it: the history it answers, the action, and the observation behind.
// Owner: the TrajectoryBuffer; valid while its lock is held.
struct TransitionView {
  TokenSpan tokens;                         // [T], from the trajectory's beginning to the next action's
  std::span<const float> rollout_logprobs;  // [A], of this action
  const TurnRecord* record;
  std::int32_t turn;
  bool is_last;
  bool terminated;  // is_last, and the trajectory terminated
  bool truncated;   // is_last, and the trajectory was truncated

  std::int64_t action_end() const noexcept { return record->action_begin + std::ssize(rollout_logprobs); }

  // Precondition: the trajectory has such a turn.
  static TransitionView of(const TrajectoryView& trajectory, std::size_t turn) noexcept;
};

struct TransitionSizes {
  std::int64_t num_transitions = 0;    // n
  std::int64_t num_tokens = 0;         // T
  std::int64_t num_action_tokens = 0;  // A
  std::int64_t max_length = 0;         // tokens of the longest
};

// Destinations of a collation; archer_fast/transitions.py explains each and shows an example. Padding as in
// packed_arrays.h.
// Owner: the caller; nothing is kept.
struct TransitionArrays {
  std::span<std::int32_t> input_ids;             // [T]
  std::span<std::int32_t> cu_seqlens;            // [n + 1]
  std::span<std::int64_t> state_positions;       // [n]
  std::span<std::int64_t> action_positions;      // [n]
  std::span<std::int64_t> next_state_positions;  // [n]
  std::span<std::int32_t> turn;                  // [n]
  std::span<float> rewards;                      // [n]
  std::span<float> returns;                      // [n]
  std::span<std::int64_t> policy_versions;       // [n]
  std::span<bool> is_last;                       // [n]
  std::span<bool> terminated;                    // [n]
  std::span<bool> truncated;                     // [n]
  std::span<float> rollout_logprobs;             // [A]
  std::span<std::int32_t> cu_actions;            // [n + 1]
  std::span<bool> attention_mask;                // [T], true at tokens; without padding empty
  std::span<bool> action_mask;                   // [T], true at this action's tokens; without padding empty

  // Throws std::invalid_argument that names the array, the length wanted and the length that came, or the field of the
  // padding.
  void check(const TransitionSizes& sizes, const std::optional<Padding>& padding) const;
};

// Throws std::invalid_argument where the batch has more tokens than int32 offsets can say.
TransitionSizes transition_sizes(std::span<const TransitionView> transitions);

// Writes every element of every array, on up to `threads` threads where there is enough to write. Pure: no lock.
// Precondition: out.check(transition_sizes(transitions), padding) passes.
void collate(std::span<const TransitionView> transitions, const std::optional<Padding>& padding, int threads,
             const TransitionArrays& out) noexcept;

}  // namespace archer_fast
