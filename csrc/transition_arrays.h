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
  std::span<bool> attention_mask;                // [T], true at tokens; without padding not written
  std::span<bool> action_mask;                   // [T], true at this action's tokens; without padding not written

  // Calls visit(name, array, length it has to have, whether that is T) for each array, in this order.
  template <class Arrays, class Visit>
  static void for_each(Arrays& arrays, const TransitionSizes& sizes, const std::optional<Padding>& padding,
                       Visit&& visit) {
    const auto [n, num_tokens, num_action_tokens, max_length] = sizes;
    const std::int64_t t = RowLayout::num_places(n, num_tokens, padding);
    visit("input_ids", arrays.input_ids, t, true);
    visit("cu_seqlens", arrays.cu_seqlens, n + 1, false);
    visit("state_positions", arrays.state_positions, n, false);
    visit("action_positions", arrays.action_positions, n, false);
    visit("next_state_positions", arrays.next_state_positions, n, false);
    visit("turn", arrays.turn, n, false);
    visit("rewards", arrays.rewards, n, false);
    visit("returns", arrays.returns, n, false);
    visit("policy_versions", arrays.policy_versions, n, false);
    visit("is_last", arrays.is_last, n, false);
    visit("terminated", arrays.terminated, n, false);
    visit("truncated", arrays.truncated, n, false);
    visit("rollout_logprobs", arrays.rollout_logprobs, num_action_tokens, false);
    visit("cu_actions", arrays.cu_actions, n + 1, false);
    if (!padding) return;
    visit("attention_mask", arrays.attention_mask, t, true);
    visit("action_mask", arrays.action_mask, t, true);
  }

  // Throws std::invalid_argument that names the array, the length wanted and the length that came.
  void check(const TransitionSizes& sizes, const std::optional<Padding>& padding) const;
};

// Throws std::invalid_argument where the batch has more tokens than int32 offsets can say.
TransitionSizes transition_sizes(std::span<const TransitionView> transitions);

// Writes every element of every array, on up to `threads` threads where there is enough to write. Pure: no lock.
// Precondition: padding->check and out.check(transition_sizes(transitions), padding) pass.
void collate(std::span<const TransitionView> transitions, const std::optional<Padding>& padding, int threads,
             const TransitionArrays& out) noexcept;

}  // namespace archer_fast
