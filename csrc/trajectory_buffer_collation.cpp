// What of a TrajectoryBuffer's trajectories is handed out together.
#include <mutex>
#include <vector>

#include "prefetch.h"
#include "trajectory_buffer.h"

namespace archer_fast {
namespace {

using ReadLock = std::shared_lock<std::shared_mutex>;

}  // namespace

std::vector<TrajectoryView> TrajectoryBuffer::views(std::span<const std::int64_t> trajectory_ids) const {
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  std::vector<TrajectoryView> views;
  views.reserve(trajectory_ids.size());
  for (const std::int64_t id : trajectory_ids) views.push_back(view(stored(id)));
  return views;
}

std::vector<TransitionView> TrajectoryBuffer::transitions(std::span<const std::int64_t> turn_ids) const {
  check_live("turn_ids", turn_ids, live_turns());
  // A loop for each step of the way to a turn: what one waits for in memory is asked for by the loop before.
  for (const std::int64_t id : turn_ids) prefetch(&stored(search_from(id)), sizeof(Stored));
  std::vector<const Stored*> owners(turn_ids.size());
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    owners[i] = &owner_of(turn_ids[i]);
    const auto turn = static_cast<std::size_t>(turn_ids[i] - owners[i]->first_turn_id);
    prefetch(owners[i]->block + turn * sizeof(TurnRecord), 2 * sizeof(TurnRecord));
  }
  std::vector<TransitionView> transitions;
  transitions.reserve(turn_ids.size());
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    const auto turn = static_cast<std::size_t>(turn_ids[i] - owners[i]->first_turn_id);
    transitions.push_back(TransitionView::of(view(*owners[i]), turn));
  }
  return transitions;
}

PackedSizes TrajectoryBuffer::collated_sizes(std::span<const std::int64_t> trajectory_ids) const {
  const ReadLock lock(mutex_);
  return packed_sizes(views(trajectory_ids));
}

void TrajectoryBuffer::collate(std::span<const std::int64_t> trajectory_ids, const std::optional<Padding>& padding,
                               int threads, const PackedArrays& out) const {
  const ReadLock lock(mutex_);
  const std::vector<TrajectoryView> trajectories = views(trajectory_ids);
  out.check(packed_sizes(trajectories), padding);
  archer_fast::collate(trajectories, padding, threads, out);
}

TransitionSizes TrajectoryBuffer::transition_sizes(std::span<const std::int64_t> turn_ids) const {
  const ReadLock lock(mutex_);
  return archer_fast::transition_sizes(transitions(turn_ids));
}

void TrajectoryBuffer::collate_transitions(std::span<const std::int64_t> turn_ids,
                                           const std::optional<Padding>& padding, int threads,
                                           const TransitionArrays& out) const {
  const ReadLock lock(mutex_);
  const std::vector<TransitionView> rows = transitions(turn_ids);
  out.check(archer_fast::transition_sizes(rows), padding);
  archer_fast::collate(rows, padding, threads, out);
}

}  // namespace archer_fast
