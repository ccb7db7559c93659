// A replay buffer of whole trajectories, each stored once as one token stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <shared_mutex>
#include <span>
#include <vector>

#include "buffer_state.h"
#include "chunk_arena.h"
#include "new_trajectory.h"
#include "packed_arrays.h"
#include "trajectory_view.h"
#include "uniform_sampler.h"

namespace archer_fast {

// Destinations of `turn_records`, one item a turn. Owner: the caller.
struct TurnColumns {
  std::span<float> rewards;
  std::span<std::int32_t> turn;  // index of the turn in its trajectory
  std::span<bool> is_last;
  std::span<bool> terminated;  // is_last, and the trajectory terminated
  std::span<bool> truncated;   // is_last, and the trajectory was truncated
};

// Capacity is bounded in tokens and in trajectories; a push that passes a bound first evicts the oldest
// trajectories, whole ones only, until both hold.
//
// Ids: trajectories and turns are numbered 0, 1, 2, ... in the order of push and never renumbered, so
// the live ids are always the contiguous ranges trajectory_range() and turn_range(), and a uniform
// draw of a transition is a uniform integer. An id outside the range (evicted, or not yet given) throws
// std::out_of_range that names the argument.
//
// Owner: everything handed in is copied, everything handed out is written to the caller's memory; no
// pointer into the buffer ever leaves it.
// Threads: every member may be called from any thread. One lock: readers share it, push and the
// sampling calls hold it alone. Between two calls another thread may evict; the ids then throw.
// Errors: std::invalid_argument, std::out_of_range, std::bad_alloc; the buffer is then as before.
class TrajectoryBuffer {
 public:
  TrajectoryBuffer(std::int64_t max_tokens, std::int64_t max_trajectories, std::uint64_t seed);

  // Continues `state`: same contents, ids, next samples and next evictions. O(T).
  static std::unique_ptr<TrajectoryBuffer> restore(const BufferState& state);
  BufferState state() const;  // O(T)

  // Copies the trajectory in and gives its id. O(T) + O(evicted turns).
  std::int64_t push(const NewTrajectory& trajectory);

  std::int64_t max_tokens() const noexcept { return max_tokens_; }
  std::int64_t max_trajectories() const noexcept { return max_trajectories_; }
  std::int64_t num_trajectories() const;
  std::int64_t num_turns() const;
  std::int64_t num_tokens() const;
  std::int64_t num_evicted() const;  // trajectories
  IdRange trajectory_range() const;
  IdRange turn_range() const;

  void sample_turns(std::span<std::int64_t> turn_ids);               // uniform, with replacement, O(n)
  void sample_trajectories(std::span<std::int64_t> trajectory_ids);  // uniform, distinct, O(n)

  // In the following, outputs have one item per id given; O(n).
  void trajectory_of(std::span<const std::int64_t> turn_ids, std::span<std::int64_t> trajectory_ids) const;
  void turn_span(std::span<const std::int64_t> trajectory_ids, std::span<std::int64_t> first_turn_ids,
                 std::span<std::int64_t> num_turns) const;
  void turn_records(std::span<const std::int64_t> turn_ids, const TurnColumns& out) const;

  // An id given twice is written twice. O(T).
  PackedSizes collated_sizes(std::span<const std::int64_t> trajectory_ids) const;
  void collate(std::span<const std::int64_t> trajectory_ids, const PackedArrays& out) const;

 private:
  // Its block in the arena is [TurnRecord x num_turns][int32 token x num_tokens][float x num_action_tokens].
  struct Stored {
    std::byte* block;
    std::int64_t first_turn_id;
    std::int32_t num_turns;
    std::int32_t num_tokens;
    std::int32_t num_action_tokens;
    bool terminated;
  };

  // All of the following expect the lock to be held.
  IdRange live_trajectories() const noexcept;
  IdRange live_turns() const noexcept;
  const Stored& stored(std::int64_t trajectory_id) const;
  const Stored& owner_of(std::int64_t turn_id) const;
  std::vector<TrajectoryView> views(std::span<const std::int64_t> trajectory_ids) const;
  void evict_oldest() noexcept;
  std::int64_t push_locked(const NewTrajectory& trajectory);
  static TrajectoryView view(const Stored& trajectory) noexcept;

  const std::int64_t max_tokens_;
  const std::int64_t max_trajectories_;

  mutable std::shared_mutex mutex_;  // guards all below
  UniformSampler sampler_;
  ChunkArena arena_;
  std::deque<Stored> trajectories_;       // of trajectory_range()
  std::deque<std::int64_t> turn_owners_;  // trajectory id of each turn of turn_range()
  std::int64_t first_trajectory_id_ = 0;
  std::int64_t first_turn_id_ = 0;
  std::int64_t num_tokens_ = 0;
};

}  // namespace archer_fast
