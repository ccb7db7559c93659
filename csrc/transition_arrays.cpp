#include "transition_arrays.h"

#include <algorithm>

#include "collation.h"
#include "parallel_ranges.h"
#include "prefetch.h"

namespace archer_fast {
namespace {

constexpr std::size_t kAhead = 4;  // transitions

std::int32_t narrow(std::int64_t value) { return static_cast<std::int32_t>(value); }

void write_masks(const RowLayout& rows, std::size_t i, const TransitionView& transition, const Padding& padding,
                 const TransitionArrays& out) {
  const std::int64_t place = rows.begin(i);
  rows.fill_pads(i, out.input_ids, padding.pad_token_id);
  rows.fill_pads(i, out.attention_mask, false);
  rows.fill_pads(i, out.action_mask, false);
  std::fill_n(out.attention_mask.data() + place, transition.tokens.size(), true);
  bool* const mask = out.action_mask.data() + place;
  std::fill_n(mask, transition.tokens.size(), false);
  std::fill(mask + transition.record->action_begin, mask + transition.action_end(), true);
}

}  // namespace

TransitionView TransitionView::of(const TrajectoryView& trajectory, std::size_t turn) noexcept {
  const TurnRecord& record = trajectory.turns[turn];
  const auto first_logprob = static_cast<std::size_t>(record.first_logprob);
  const auto num_action_tokens = static_cast<std::size_t>(trajectory.num_action_tokens(turn));
  const bool is_last = turn + 1 == trajectory.turns.size();
  return {.tokens = trajectory.tokens.first(trajectory.next_state_end(turn)),
          .rollout_logprobs = trajectory.rollout_logprobs.subspan(first_logprob, num_action_tokens),
          .record = &record,
          .turn = static_cast<std::int32_t>(turn),
          .is_last = is_last,
          .terminated = is_last && trajectory.terminated,
          .truncated = is_last && !trajectory.terminated};
}

void TransitionArrays::check(const TransitionSizes& sizes, const std::optional<Padding>& padding) const {
  for_each(*this, sizes, padding, [](const char* name, const auto& array, std::int64_t wanted, bool) {
    check_length(name, array.size(), wanted);
  });
}

TransitionSizes transition_sizes(std::span<const TransitionView> transitions) {
  TransitionSizes sizes;
  sizes.num_transitions = std::ssize(transitions);
  for (const TransitionView& transition : transitions) {
    sizes.num_tokens += transition.tokens.size();
    sizes.num_action_tokens += std::ssize(transition.rollout_logprobs);
    sizes.max_length = std::max(sizes.max_length, transition.tokens.size());
  }
  check_num_tokens("turn_ids", sizes.num_tokens);
  return sizes;
}

void collate(std::span<const TransitionView> transitions, const std::optional<Padding>& padding, int threads,
             const TransitionArrays& out) noexcept {
  out.cu_seqlens[0] = 0;
  out.cu_actions[0] = 0;
  for (std::size_t i = 0; i < transitions.size(); ++i) {
    out.cu_seqlens[i + 1] = narrow(out.cu_seqlens[i] + transitions[i].tokens.size());
    out.cu_actions[i + 1] = narrow(out.cu_actions[i] + std::ssize(transitions[i].rollout_logprobs));
  }
  const RowLayout rows(out.cu_seqlens, padding);
  const auto write = [&](std::int64_t begin, std::int64_t end) noexcept {
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
      if (i + kAhead < transitions.size()) {
        const TransitionView& next = transitions[i + kAhead];
        prefetch(next.tokens.data(), next.tokens.num_bytes());
        prefetch(next.rollout_logprobs.data(), next.rollout_logprobs.size_bytes());
      }
      const TransitionView& transition = transitions[i];
      const TurnRecord& record = *transition.record;
      const std::int64_t place = rows.begin(i);
      transition.tokens.copy(out.input_ids.data() + place);
      std::copy(transition.rollout_logprobs.begin(), transition.rollout_logprobs.end(),
                out.rollout_logprobs.data() + out.cu_actions[i]);
      out.state_positions[i] = place + record.action_begin - 1;
      out.action_positions[i] = place + transition.action_end() - 1;
      out.next_state_positions[i] = place + transition.tokens.size() - 1;
      out.turn[i] = transition.turn;
      out.rewards[i] = record.reward;
      out.returns[i] = record.monte_carlo_return;
      out.policy_versions[i] = record.policy_version;
      out.is_last[i] = transition.is_last;
      out.terminated[i] = transition.terminated;
      out.truncated[i] = transition.truncated;
      if (padding) write_masks(rows, i, transition, *padding, out);
    }
  };
  parallel_ranges(std::ssize(transitions),
                  threads_worth(static_cast<std::int64_t>(out.input_ids.size_bytes()), threads), write);
}

}  // namespace archer_fast
