// A replay buffer of whole trajectories, each stored once as one token stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <span>
#include <utility>
#include <vector>

#include "buffer_state.h"
#include "chunk_arena.h"
#include "id_range.h"
#include "new_trajectory.h"
#include "packed_arrays.h"
#include "task_strata.h"
#include "trajectory_view.h"
#include "turn_priorities.h"
#include "uniform_sampler.h"
#include "version_table.h"

namespace archer_fast {

// Destinations of `turn_records`, one item a turn. Owner: the caller.
struct TurnColumns {
  std::span<float> rewards;
  std::span<std::int32_t> turn;  // index of the turn in its trajectory
  std::span<bool> is_last;
  std::span<bool> terminated;  // is_last, and the trajectory terminated
  std::span<bool> truncated;   // is_last, and the trajectory was truncated
};

// Which turns may be drawn, and how.
struct TurnQuery {
  static constexpr std::int64_t kAnyVersion = std::numeric_limits<std::int64_t>::min();

  bool replacement = true;                        // else distinct
  std::int64_t min_policy_version = kAnyVersion;  // turns of this version and later ones only
  bool by_task = false;                           // equal numbers of each task (task_strata.h)
};

// A consistent look at the whole buffer.
struct BufferStats {
  std::int64_t num_trajectories;
  std::int64_t num_turns;
  std::int64_t num_tokens;
  std::int64_t num_evicted;  // trajectories
  std::int64_t num_bytes;    // held from the system, what malloc adds not counted
  // The age of a turn is how many trajectories were pushed after its own. (a, turns): ages a to 2 a - 1,
  // for a = 0, 1, 2, 4, 8, ...
  std::vector<std::pair<std::int64_t, std::int64_t>> turns_by_age;
  std::vector<std::pair<std::int64_t, std::int64_t>> turns_by_version;  // (version, turns), ascending
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

  // The scalars of state(), and the arrays of the live trajectories with this id and later ones alone:
  // what a writer that has the earlier ones must add. An id before the first live one gives state(). O(T) of
  // these. Throws std::out_of_range for an id beyond the end of trajectory_range().
  BufferState state_since(std::int64_t first_trajectory_id) const;

  // Copies the trajectory in and gives its id. O(T) + O(evicted turns), and O(log N) where priorities are
  // in use.
  std::int64_t push(const NewTrajectory& trajectory);

  std::int64_t max_tokens() const noexcept { return max_tokens_; }
  std::int64_t max_trajectories() const noexcept { return max_trajectories_; }
  std::int64_t num_trajectories() const;
  std::int64_t num_turns() const;
  std::int64_t num_tokens() const;
  std::int64_t num_evicted() const;  // trajectories
  IdRange trajectory_range() const;
  IdRange turn_range() const;
  BufferStats stats() const;  // O(live versions + log B)

  // The samplers share one counter-based generator: the same seed and calls draw the same ids on every
  // machine. They throw std::invalid_argument where there is too little to draw from, and nothing is drawn.

  // Uniform over the live turns that the query allows. O(n). Where the query names a version or tasks, the
  // first call after a push, or with another query, takes O(B) of the trajectories from the first that may
  // have a turn of that version on; the calls that repeat it O(n log B). Nothing is assumed of the order in
  // which versions were pushed.
  void sample_turns(std::span<std::int64_t> turn_ids, const TurnQuery& query = {});

  // Uniform, distinct. O(n); by task as above.
  void sample_trajectories(std::span<std::int64_t> trajectory_ids, bool by_task = false);

  // In proportion to priority, and each turn's importance weight: turn_priorities.h says how, and what
  // it costs. The spans have one length.
  void sample_prioritised(double beta, std::span<std::int64_t> turn_ids, std::span<float> weights);

  // Returns how many of the turns were evicted since; see turn_priorities.h.
  std::int64_t update_priorities(std::span<const std::int64_t> turn_ids, std::span<const double> priorities);
  std::vector<double> priorities() const;  // of turn_range(), O(N)

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
    std::int64_t min_version;  // of its turns
    std::int64_t max_version;
    std::int32_t num_turns;
    std::int32_t num_tokens;
    std::int32_t num_action_tokens;
    std::int32_t task_id;
    bool terminated;
  };

  // What some query may draw, and what was asked when: any push makes another `end`.
  struct Choice {
    bool of_turns;
    std::int64_t min_policy_version;
    bool by_task;
    std::int64_t end;  // of trajectory_range()

    bool operator==(const Choice&) const = default;
  };

  // All of the following expect the lock to be held.
  IdRange live_trajectories() const noexcept;
  IdRange live_turns() const noexcept;
  const Stored& stored(std::int64_t trajectory_id) const;
  const Stored& owner_of(std::int64_t turn_id) const;
  std::vector<TrajectoryView> views(std::span<const std::int64_t> trajectory_ids) const;
  BufferState state_from(std::int64_t first_trajectory_id) const;
  const TaskStrata& strata_of(bool of_turns, std::int64_t min_policy_version, bool by_task);
  std::int64_t num_bytes() const noexcept;
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
  TurnPriorities priorities_;             // of turn_range()
  VersionTable versions_;
  std::optional<Choice> choice_;  // what strata_ holds
  TaskStrata strata_;
  std::int64_t first_trajectory_id_ = 0;
  std::int64_t first_turn_id_ = 0;
  std::int64_t num_tokens_ = 0;
};

}  // namespace archer_fast
