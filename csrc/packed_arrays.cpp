#include "packed_arrays.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#include "collation.h"
#include "parallel_ranges.h"
#include "prefetch.h"

namespace archer_fast {
namespace {

constexpr std::size_t kAhead = 2;                   // trajectories
constexpr std::int64_t kBytesPerPlace = 4 * 4 + 1;  // ids, positions, turns, log-probs, mask

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

std::int32_t narrow(std::int64_t value) { return static_cast<std::int32_t>(value); }

// A row that is written from front to back, in blocks of one size. A piece may be written too long, where the row has
// room: the next piece covers it. Most pieces are shorter than a block, and stores of exact length cost four times
// more.
template <class T>
class RowWriter {
 public:
  RowWriter(std::span<T> out, std::int64_t place, std::int64_t length)
      : row_(out.subspan(index(place), index(length))) {}

  std::size_t rest() const { return row_.size() - next_; }

  void fill(std::size_t count, T value) {
    const std::size_t end = next_ + count;
    for (; next_ < end && next_ + kBlock <= row_.size(); next_ += kBlock) std::fill_n(&row_[next_], kBlock, value);
    for (; next_ < end; ++next_) row_[next_] = value;
    next_ = end;
  }

  // The first `count` items of `from`.
  void copy(std::span<const T> from, std::size_t count) {
    const std::size_t begin = next_, end = begin + count, readable = begin + from.size();
    for (; next_ < end && next_ + kBlock <= std::min(row_.size(), readable); next_ += kBlock) {
      std::memcpy(&row_[next_], &from[next_ - begin], kBlock * sizeof(T));
    }
    for (; next_ < end; ++next_) row_[next_] = from[next_ - begin];
    next_ = end;
  }

 private:
  static constexpr std::size_t kBlock = 16;

  const std::span<T> row_;
  std::size_t next_ = 0;
};

// What belongs to the tokens of a trajectory, of which the first goes to `place` and the first turn is row `row`.
void write_tokens(const TrajectoryView& trajectory, std::int64_t place, std::int64_t row, const PackedArrays& out) {
  const std::int64_t length = trajectory.tokens.size();
  trajectory.tokens.copy(out.input_ids.data() + place);
  std::iota(out.position_ids.data() + place, out.position_ids.data() + place + length, 0);

  RowWriter turn_ids(out.turn_ids, place, length);
  RowWriter mask(out.action_mask, place, length);
  RowWriter scores(out.rollout_logprobs, place, length);
  const std::span logprobs = trajectory.rollout_logprobs;
  std::int32_t begin = 0, turn_id = narrow(row);
  for (std::size_t i = 0; i < trajectory.turns.size(); ++i) {
    const TurnRecord& turn = trajectory.turns[i];
    const std::int32_t num_observed = turn.action_begin - begin, num_sampled = trajectory.num_action_tokens(i);
    turn_ids.fill(index(num_observed + num_sampled), turn_id++);
    mask.fill(index(num_observed), false);
    mask.fill(index(num_sampled), true);
    scores.fill(index(num_observed), 0.0F);
    scores.copy(logprobs.subspan(index(turn.first_logprob)), index(num_sampled));
    begin = turn.action_begin + num_sampled;
  }
  turn_ids.fill(turn_ids.rest(), turn_id - 1);
  mask.fill(mask.rest(), false);
  scores.fill(scores.rest(), 0.0F);
}

void write_turns(const TrajectoryView& trajectory, std::int64_t place, std::int64_t row, const PackedArrays& out) {
  for (std::size_t i = 0; i < trajectory.turns.size(); ++i) {
    const TurnRecord& turn = trajectory.turns[i];
    const std::size_t at = index(row) + i;
    out.state_positions[at] = place + turn.action_begin - 1;
    out.action_positions[at] = place + trajectory.action_end(i) - 1;
    out.turn[at] = static_cast<std::int32_t>(i);
    out.rewards[at] = turn.reward;
    out.returns[at] = turn.monte_carlo_return;
    out.policy_versions[at] = turn.policy_version;
  }
}

void write_pads(const RowLayout& rows, std::size_t i, const Padding& padding, const PackedArrays& out) {
  rows.fill_pads(i, out.input_ids, padding.pad_token_id);
  rows.fill_pads(i, out.position_ids, std::int32_t{0});
  rows.fill_pads(i, out.turn_ids, std::int32_t{-1});
  rows.fill_pads(i, out.action_mask, false);
  rows.fill_pads(i, out.rollout_logprobs, 0.0F);
  rows.fill_pads(i, out.attention_mask, false);
}

void prefetch(const TrajectoryView& trajectory) {
  const auto* const begin = reinterpret_cast<const std::byte*>(trajectory.turns.data());  // one block, turns first
  const std::byte* const end = trajectory.tokens.data() + trajectory.tokens.num_bytes();
  archer_fast::prefetch(begin, static_cast<std::size_t>(end - begin));
}

}  // namespace

void PackedArrays::check(const PackedSizes& sizes, const std::optional<Padding>& padding) const {
  for_each(*this, sizes, padding, [](const char* name, const auto& array, std::int64_t wanted, bool) {
    check_length(name, array.size(), wanted);
  });
}

PackedSizes packed_sizes(std::span<const TrajectoryView> trajectories) {
  PackedSizes sizes;
  sizes.num_trajectories = std::ssize(trajectories);
  for (const TrajectoryView& trajectory : trajectories) {
    sizes.num_turns += std::ssize(trajectory.turns);
    sizes.num_tokens += trajectory.tokens.size();
    sizes.max_length = std::max(sizes.max_length, trajectory.tokens.size());
  }
  check_num_tokens("trajectory_ids", sizes.num_tokens);
  return sizes;
}

void collate(std::span<const TrajectoryView> trajectories, const std::optional<Padding>& padding, int threads,
             const PackedArrays& out) noexcept {
  out.cu_seqlens[0] = 0;
  out.cu_turns[0] = 0;
  for (std::size_t i = 0; i < trajectories.size(); ++i) {
    out.cu_seqlens[i + 1] = narrow(out.cu_seqlens[i] + trajectories[i].tokens.size());
    out.cu_turns[i + 1] = narrow(out.cu_turns[i] + std::ssize(trajectories[i].turns));
  }
  const RowLayout rows(out.cu_seqlens, padding);
  const auto write = [&](std::int64_t begin, std::int64_t end) noexcept {
    for (std::size_t i = index(begin); i < index(end); ++i) {
      if (i + kAhead < trajectories.size()) prefetch(trajectories[i + kAhead]);
      const TrajectoryView& trajectory = trajectories[i];
      const std::int64_t place = rows.begin(i);
      write_tokens(trajectory, place, out.cu_turns[i], out);
      write_turns(trajectory, place, out.cu_turns[i], out);
      if (padding) {
        std::fill_n(out.attention_mask.data() + place, trajectory.tokens.size(), true);
        write_pads(rows, i, *padding, out);
      }
      out.final_positions[i] = place + trajectory.tokens.size() - 1;
      out.terminated[i] = trajectory.terminated;
      out.truncated[i] = !trajectory.terminated;
    }
  };
  parallel_ranges(std::ssize(trajectories), threads_worth(std::ssize(out.input_ids) * kBytesPerPlace, threads), write);
}

}  // namespace archer_fast
