// A replay buffer of whole trajectories, each stored once as one token stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "buffer_options.h"
#include "buffer_state.h"
#include "chunk_arena.h"
#include "fair_mutex.h"
#include "feature_store.h"
#include "id_range.h"
#include "new_trajectory.h"
#include "packed_arrays.h"
#include "row_layout.h"
#include "task_strata.h"
#include "trajectory_columns.h"
#include "trajectory_view.h"
#include "transition_arrays.h"
#include "turn_owners.h"
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

// See TrajectoryBuffer::snapshot.
struct BufferSnapshot {
  BufferState since;  // the scalars of state(), and the arrays of the trajectories with this id and later ones alone
  std::vector<double> priorities;       // of turn_range()
  std::vector<std::int64_t> num_turns;  // of trajectory_range()
};

// What is to be collated, and its sizes. Only the buffer that made it reads `rows`.
template <class View, class SizesOfRows>
struct Plan {
  using Sizes = SizesOfRows;

  std::vector<View> rows;
  Sizes sizes;
  std::int64_t oldest;  // of the trajectories that `rows` point to
};
using TrajectoryPlan = Plan<TrajectoryView, PackedSizes>;
using TransitionPlan = Plan<TransitionView, TransitionSizes>;

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
  std::int64_t num_mapped_bytes;                                        // of features in files, beside num_bytes
};

// Capacity is bounded in tokens and in trajectories; a push that passes a bound first evicts the oldest
// trajectories, whole ones only, until both hold.
//
// Ids: trajectories and turns are numbered 0, 1, 2, ... in the order of push and never renumbered, so
// the live ids are always the contiguous ranges trajectory_range() and turn_range(), and a uniform
// draw of a transition is a uniform integer. An id outside the range (evicted, or not yet given) throws
// std::out_of_range that names the argument.
//
// Owner: everything handed in is copied, everything handed out is written to the caller's memory; no pointer into the
// buffer leaves it but those of a Plan, which it alone reads.
// Threads: every member may be called from any thread. One lock: readers share it, push and the sampling calls hold it
// alone, and it is fair (fair_mutex.h). Between two calls another thread may evict; the ids then throw. Arguments are
// read while the call lasts: nobody else may write to them meanwhile.
// Errors: std::invalid_argument, std::out_of_range, std::bad_alloc, and std::system_error where features find no room
// on the disk; the buffer is then as before.
class TrajectoryBuffer {
 public:
  explicit TrajectoryBuffer(const BufferOptions& options, const FeatureMemory& memory = {});

  // Continues `state`: same contents, ids, next samples and next evictions; without features. O(T).
  static std::unique_ptr<TrajectoryBuffer> restore(const BufferState& state, const FeatureMemory& memory = {});
  BufferState state() const;  // O(T)

  // What a writer must add that has the trajectories before this id; all of one moment. An id before the first live one
  // gives everything. O(T) of the later ones and O(N). Throws std::out_of_range for an id beyond the end of
  // trajectory_range().
  BufferSnapshot snapshot(std::int64_t first_trajectory_id) const;

  // Copies the trajectory in and gives its id. O(T) + O(evicted turns), and O(log N) where priorities are
  // in use.
  std::int64_t push(const NewTrajectory& trajectory);

  // Pushes all of them, at one moment, or none; gives their ids. One that is longer than the buffer, or refused for
  // what is in it, is named by its place. O(T) and as above. After std::bad_alloc or std::system_error those before it
  // stay.
  IdRange extend(const TrajectoryColumns& trajectories);

  const BufferOptions& options() const noexcept { return options_; }
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
  void lengths(std::span<const std::int64_t> trajectory_ids, std::span<std::int64_t> num_tokens) const;
  void turn_records(std::span<const std::int64_t> turn_ids, const TurnColumns& out) const;

  // Batches (trajectory_buffer_collation.cpp) are made in two steps, because their sizes are known after the first
  // alone: a plan of whole trajectories, or of transitions, in the order of the ids; one given twice is written twice.
  // Then everything is copied to memory of those sizes, O(T) on up to `threads` threads. Where a push between the two
  // evicted one of them, that throws std::out_of_range and nothing is written.
  TrajectoryPlan plan(std::span<const std::int64_t> trajectory_ids) const;        // O(B)
  TransitionPlan plan_transitions(std::span<const std::int64_t> turn_ids) const;  // O(n)
  void collate(const TrajectoryPlan& plan, const std::optional<Padding>& padding, int threads,
               const PackedArrays& out) const;
  void collate(const TransitionPlan& plan, const std::optional<Padding>& padding, int threads,
               const TransitionArrays& out) const;

  // Features (trajectory_buffer_features.cpp): a trajectory of N turns has room for N + 1 rows of feature_bytes each,
  // taken as it is pushed, and freed with it. What a row means is the caller's to say: row i is what is known at turn
  // i, row N what is known after the last one, so that what follows a turn is always the row behind its own. All rows
  // of a trajectory were made by one version of a trunk, a number of 0 or more; a new trajectory has none. Where
  // feature_bytes is 0, these throw std::invalid_argument.

  // Copies in `rows`, all of these trajectories' end to end; of an id given twice the last ones hold.
  void set_features(std::span<const std::int64_t> trajectory_ids, std::int64_t trunk_version,
                    std::span<const std::byte> rows);

  // Copies out each turn's row, and the front of the row behind it: as much as next_rows has room for, n times 0 to
  // feature_bytes. Throws std::invalid_argument that names a turn whose trajectory has no features of this version.
  // O(bytes) on up to `threads` threads.
  void read_features(std::span<const std::int64_t> turn_ids, std::int64_t trunk_version, std::span<std::byte> rows,
                     std::span<std::byte> next_rows, int threads) const;

  std::vector<std::int64_t> trajectories_without_features(std::int64_t trunk_version) const;  // live ones, O(B)

  // For a writer that keeps what it wrote: a number that grows with every set_features; the largest that any live
  // trajectory of a range was given, 0 where none has features; and whole trajectories: the version of each, or
  // FeatureStore::kNoVersion with zeros for rows where it has none or has been evicted by now, which is no error.
  // num_turns says how many turns each has, or had. 0 and nothing where feature_bytes is 0.
  std::uint64_t features_stamp() const;
  std::uint64_t features_stamp(IdRange trajectory_ids) const;
  void copy_features(std::int64_t first_trajectory_id, std::span<const std::int64_t> num_turns,
                     std::span<std::int64_t> trunk_versions, std::span<std::byte> rows) const;

 private:
  // Its block in the arena is [TurnRecord x num_turns][float x num_action_tokens][token x num_tokens].
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
  std::int64_t search_from(std::int64_t turn_id) const;  // its owner, or a live trajectory shortly before it
  std::int64_t owner_id(std::int64_t turn_id) const;
  const Stored& owner_of(std::int64_t turn_id) const { return stored(owner_id(turn_id)); }
  template <class PlanOfRows, class Arrays>
  void collate_rows(const char* ids, const PlanOfRows& plan, const std::optional<Padding>& padding, int threads,
                    const Arrays& out) const;
  BufferState state_from(std::int64_t first_trajectory_id) const;
  const TaskStrata& strata_of(bool of_turns, std::int64_t min_policy_version, bool by_task);
  std::int64_t num_bytes() const noexcept;
  void evict_oldest() noexcept;
  void check(const NewTrajectory& trajectory) const;
  std::int64_t push_locked(const NewTrajectory& trajectory);
  void write_block(const NewTrajectory& trajectory, std::byte* block) const noexcept;
  TrajectoryView view(const Stored& trajectory) const noexcept;
  void need_features() const;  // throws std::invalid_argument where there are none
  std::size_t place_of(std::int64_t trajectory_id) const noexcept {  // of a live one in trajectories_ and features_
    return static_cast<std::size_t>(trajectory_id - first_trajectory_id_);
  }

  const BufferOptions options_;
  const bool is_narrow_;  // tokens take two bytes

  mutable FairSharedMutex mutex_;  // guards all below
  UniformSampler sampler_;
  ChunkArena arena_;
  std::deque<Stored> trajectories_;  // of trajectory_range()
  TurnOwners owners_;                // of turn_range()
  TurnPriorities priorities_;        // of turn_range()
  VersionTable versions_;
  std::optional<FeatureStore> features_;  // of trajectory_range()
  std::optional<Choice> choice_;          // what strata_ holds
  TaskStrata strata_;
  std::int64_t first_trajectory_id_ = 0;
  std::int64_t first_turn_id_ = 0;
  std::int64_t end_turn_id_ = 0;
  std::int64_t num_tokens_ = 0;
};

}  // namespace archer_fast
