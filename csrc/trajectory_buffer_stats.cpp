// What a TrajectoryBuffer holds, counted.
#include <algorithm>

#include "trajectory_buffer.h"

namespace archer_fast {

BufferStats TrajectoryBuffer::stats() const {
  const ReadLock lock(mutex_);
  const IdRange trajectories = live_trajectories(), turns = live_turns();
  BufferStats stats{.num_trajectories = trajectories.size(),
                    .num_turns = turns.size(),
                    .num_tokens = num_tokens_,
                    .num_evicted = trajectories.first,
                    .num_bytes = num_bytes(),
                    .turns_by_age = {},
                    .turns_by_version = {},
                    .num_mapped_bytes = features_ ? static_cast<std::int64_t>(features_->mapped_bytes()) : 0};
  // The trajectory of age a is the last but a, and turn ids ascend with the trajectories'.
  std::int64_t turn_end = turns.end;
  for (std::int64_t age = 0; age < trajectories.size(); age = std::max<std::int64_t>(1, 2 * age)) {
    const std::int64_t oldest = std::max(trajectories.first, trajectories.end - std::max<std::int64_t>(1, 2 * age));
    const std::int64_t first_turn = stored(oldest).first_turn_id;
    stats.turns_by_age.emplace_back(age, turn_end - first_turn);
    turn_end = first_turn;
  }
  for (const auto& [version, entry] : versions_.entries()) {
    stats.turns_by_version.emplace_back(version, entry.num_turns);
  }
  return stats;
}

std::int64_t TrajectoryBuffer::num_bytes() const noexcept {
  const std::size_t indices = trajectories_.size() * sizeof(Stored) + owners_.num_bytes() +
                              versions_.entries().size() * sizeof(VersionTable::Entry) + strata_.num_bytes();
  const std::size_t features = features_ ? features_->ram_bytes() : 0;
  return static_cast<std::int64_t>(arena_.reserved_bytes() + indices + priorities_.num_bytes() + features);
}

}  // namespace archer_fast
