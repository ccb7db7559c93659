// What of a TrajectoryBuffer is handed out together.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "concat.h"
#include "prefetch.h"
#include "trajectory_buffer.h"

namespace archer_fast {
namespace {

constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();

}  // namespace

TrajectoryPlan TrajectoryBuffer::plan(std::span<const std::int64_t> trajectory_ids) const {
  const ReadLock lock(mutex_);
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  TrajectoryPlan plan{.rows = {}, .sizes = {}, .oldest = kNone};
  plan.rows.reserve(trajectory_ids.size());
  for (const std::int64_t id : trajectory_ids) {
    plan.rows.push_back(view(stored(id)));
    plan.oldest = std::min(plan.oldest, id);
  }
  plan.sizes = packed_sizes(plan.rows);
  return plan;
}

TransitionPlan TrajectoryBuffer::plan_transitions(std::span<const std::int64_t> turn_ids) const {
  const ReadLock lock(mutex_);
  check_live("turn_ids", turn_ids, live_turns());
  TransitionPlan plan{.rows = {}, .sizes = {}, .oldest = kNone};
  // A loop for each step of the way to a turn: what one waits for in memory is asked for by the loop before.
  for (const std::int64_t id : turn_ids) prefetch(&stored(search_from(id)), sizeof(Stored));
  std::vector<const Stored*> owners(turn_ids.size());
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    const std::int64_t owner = owner_id(turn_ids[i]);
    plan.oldest = std::min(plan.oldest, owner);
    owners[i] = &stored(owner);
    const auto turn = static_cast<std::size_t>(turn_ids[i] - owners[i]->first_turn_id);
    prefetch(owners[i]->block + turn * sizeof(TurnRecord), 2 * sizeof(TurnRecord));
  }
  plan.rows.reserve(turn_ids.size());
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    const auto turn = static_cast<std::size_t>(turn_ids[i] - owners[i]->first_turn_id);
    plan.rows.push_back(TransitionView::of(view(*owners[i]), turn));
  }
  plan.sizes = transition_sizes(plan.rows);
  return plan;
}

template <class PlanOfRows, class Arrays>
void TrajectoryBuffer::collate_rows(const char* ids, const PlanOfRows& plan, const std::optional<Padding>& padding,
                                    int threads, const Arrays& out) const {
  if (padding) padding->check(std::ssize(plan.rows), plan.sizes.max_length);
  out.check(plan.sizes, padding);
  const ReadLock lock(mutex_);
  if (plan.oldest < first_trajectory_id_) {
    throw std::out_of_range(concat(ids, ": wanted live trajectories, got one of ", plan.oldest,
                                   ", which a push has evicted since the batch was planned"));
  }
  archer_fast::collate(plan.rows, padding, threads, out);
}

void TrajectoryBuffer::collate(const TrajectoryPlan& plan, const std::optional<Padding>& padding, int threads,
                               const PackedArrays& out) const {
  collate_rows("trajectory_ids", plan, padding, threads, out);
}

void TrajectoryBuffer::collate(const TransitionPlan& plan, const std::optional<Padding>& padding, int threads,
                               const TransitionArrays& out) const {
  collate_rows("turn_ids", plan, padding, threads, out);
}

}  // namespace archer_fast
