// A trajectory buffer as one would write it who minds neither time nor memory: what the fuzz targets compare with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "buffer_state.h"
#include "id_range.h"
#include "plain_trajectory.h"
#include "trajectory_buffer.h"

namespace archer_fast::fuzzing {

// One turn, cut out of its trajectory.
struct PlainTurn {
  std::int64_t trajectory_id;
  std::size_t index;  // in its trajectory
  bool is_last;
  std::size_t observation_begin = 0;  // places in the trajectory's tokens
  std::size_t action_begin = 0, action_end = 0;
  std::size_t next_state_end = 0;  // of the observation that answers the action
  std::size_t first_logprob = 0;   // place in the trajectory's log-probs
};

// What was set of one trajectory last.
struct PlainFeatures {
  std::int64_t trunk_version = FeatureStore::kNoVersion;
  std::uint64_t stamp = 0;
  std::vector<std::byte> rows;  // none where nothing was set
};

// The contract of TrajectoryBuffer, said a second time. Every call is O(all that is held) or worse.
struct PlainBuffer {
  BufferOptions options;
  std::uint64_t counter = 0;  // not predicted: taken over from the other one after each draw
  std::int64_t first_trajectory_id = 0;
  std::int64_t first_turn_id = 0;
  double max_priority = 1.0;
  std::deque<PlainTrajectory> games;
  std::deque<double> priorities;
  std::deque<PlainFeatures> features;  // one a game, whether or not the options leave room for any
  std::uint64_t features_stamp = 0;    // how many were set

  explicit PlainBuffer(const BufferOptions& made_with) : options(made_with) {}
  explicit PlainBuffer(const BufferState& state);  // Precondition: TrajectoryBuffer::restore takes it.

  IdRange trajectory_range() const noexcept;
  IdRange turn_range() const noexcept;
  BufferState state_since(std::int64_t first_trajectory_id) const;

  // Precondition: game.fits(options).
  void push(const PlainTrajectory& game);

  // Precondition: the id is live, the version not negative, and rows are feature_bytes_of(the id) bytes.
  void set_features(std::int64_t trajectory_id, std::int64_t trunk_version, std::span<const std::byte> rows);

  // Precondition: the id is live.
  const PlainTrajectory& game(std::int64_t trajectory_id) const;
  PlainTurn turn(std::int64_t turn_id) const;
  std::int64_t first_turn_of(std::int64_t trajectory_id) const;
  std::vector<float> returns(std::int64_t trajectory_id) const;
  const PlainFeatures& features_of(std::int64_t trajectory_id) const;
  std::size_t feature_bytes_of(std::int64_t trajectory_id) const;  // of all its rows

  // The live turns of this version and later ones, or the live trajectories; and whether n of them can be drawn.
  std::vector<std::int64_t> turns_since(std::int64_t min_policy_version) const;
  bool can_draw(std::span<const std::int64_t> tasks, std::size_t n, bool replacement, bool by_task) const;
  std::vector<std::int64_t> tasks_of_turns(std::span<const std::int64_t> turn_ids) const;
};

// Of trajectories end to end, those of a state.
std::vector<PlainTrajectory> cut(const TrajectoryColumns& columns);

bool are_same(const BufferState& one, const BufferState& other);

// The two hold the same.
void check_same(const TrajectoryBuffer& buffer, const PlainBuffer& plain);

}  // namespace archer_fast::fuzzing
