// What is drawn from a TrajectoryBuffer.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "concat.h"
#include "trajectory_buffer.h"

namespace archer_fast {

void TrajectoryBuffer::sample_turns(std::span<std::int64_t> turn_ids, const TurnQuery& query) {
  const WriteLock lock(mutex_);
  if (turn_ids.empty()) return;
  if (query.min_policy_version != TurnQuery::kAnyVersion || query.by_task) {
    strata_of(true, query.min_policy_version, query.by_task).draw(sampler_, query.replacement, turn_ids);
  } else if (query.replacement) {
    sampler_.draw(live_turns(), turn_ids);
  } else {
    sampler_.draw_distinct(live_turns(), turn_ids);
  }
}

void TrajectoryBuffer::sample_trajectories(std::span<std::int64_t> trajectory_ids, bool by_task) {
  const WriteLock lock(mutex_);
  if (by_task) {
    strata_of(false, TurnQuery::kAnyVersion, true).draw(sampler_, false, trajectory_ids);
  } else {
    sampler_.draw_distinct(live_trajectories(), trajectory_ids);
  }
}

// One answer is kept: a training loop asks the same question many times between two pushes.
const TaskStrata& TrajectoryBuffer::strata_of(bool of_turns, std::int64_t min_policy_version, bool by_task) {
  const IdRange live = live_trajectories();
  const Choice choice{
      .of_turns = of_turns, .min_policy_version = min_policy_version, .by_task = by_task, .end = live.end};
  if (choice_ == choice) return strata_;

  const VersionTable::Entry allowed = versions_.since(min_policy_version);
  if (allowed.num_turns == 0 && live.size() > 0) {
    throw std::invalid_argument(concat("min_policy_version: wanted at most ", versions_.entries().rbegin()->first,
                                       ", the newest of a live turn, got ", min_policy_version));
  }
  TaskStrata strata;
  for (std::int64_t id = std::max(live.first, allowed.first_trajectory_id); id < live.end; ++id) {
    const Stored& trajectory = stored(id);
    const std::int32_t task_id = by_task ? trajectory.task_id : 0;
    const IdRange turns{trajectory.first_turn_id, trajectory.first_turn_id + trajectory.num_turns};
    if (!of_turns) {
      strata.add(task_id, {id, id + 1});
    } else if (trajectory.min_version >= min_policy_version) {
      strata.add(task_id, turns);
    } else if (trajectory.max_version >= min_policy_version) {
      std::int64_t turn_id = turns.first;
      for (const TurnRecord& turn : view(trajectory).turns) {
        if (turn.policy_version >= min_policy_version) strata.add(task_id, {turn_id, turn_id + 1});
        ++turn_id;
      }
    }
  }
  choice_.reset();  // should the next line throw
  strata_ = std::move(strata);
  choice_ = choice;
  return strata_;
}

void TrajectoryBuffer::sample_prioritised(double beta, std::span<std::int64_t> turn_ids, std::span<float> weights) {
  if (weights.size() != turn_ids.size()) {
    throw std::invalid_argument(concat("weights: wanted length ", turn_ids.size(), ", got ", weights.size()));
  }
  const WriteLock lock(mutex_);
  priorities_.draw(sampler_, beta, turn_ids, weights);
}

std::int64_t TrajectoryBuffer::update_priorities(std::span<const std::int64_t> turn_ids,
                                                 std::span<const double> priorities) {
  const WriteLock lock(mutex_);
  return priorities_.update(turn_ids, priorities);
}

std::vector<double> TrajectoryBuffer::priorities() const {
  const ReadLock lock(mutex_);
  return priorities_.from(first_turn_id_);
}

}  // namespace archer_fast
