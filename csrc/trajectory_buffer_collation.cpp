// What of a TrajectoryBuffer's trajectories is handed out together.
#include <mutex>
#include <vector>

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

PackedSizes TrajectoryBuffer::collated_sizes(std::span<const std::int64_t> trajectory_ids) const {
  const ReadLock lock(mutex_);
  return packed_sizes(views(trajectory_ids));
}

void TrajectoryBuffer::collate(std::span<const std::int64_t> trajectory_ids, const PackedArrays& out) const {
  const ReadLock lock(mutex_);
  const std::vector<TrajectoryView> trajectories = views(trajectory_ids);
  out.check(packed_sizes(trajectories));
  archer_fast::collate(trajectories, out);
}

}  // namespace archer_fast
