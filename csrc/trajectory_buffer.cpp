#include "trajectory_buffer.h"

#include <algorithm>
#include <cassert>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "concat.h"

namespace archer_fast {
namespace {

using ReadLock = std::shared_lock<std::shared_mutex>;
using WriteLock = std::unique_lock<std::shared_mutex>;

// The arena hands out bytes; these types may begin their life in them.
static_assert(std::is_trivially_copyable_v<TurnRecord> && alignof(TurnRecord) <= ChunkArena::kAlignment);
static_assert(sizeof(TurnRecord) % alignof(std::int32_t) == 0 && sizeof(float) == sizeof(std::int32_t));

std::int64_t at_least(const char* name, std::int64_t value, std::int64_t wanted) {
  if (value < wanted) throw std::invalid_argument(concat(name, ": wanted at least ", wanted, ", got ", value));
  return value;
}

void check_live(const char* name, std::span<const std::int64_t> ids, IdRange live) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (!live.contains(ids[i])) {
      throw std::out_of_range(
          concat(name, "[", i, "]: wanted a live id in [", live.first, ", ", live.end, "), got ", ids[i]));
    }
  }
}

void check_length(const char* name, std::size_t length, std::size_t wanted) {
  if (length != wanted) throw std::invalid_argument(concat(name, ": wanted length ", wanted, ", got ", length));
}

template <class T, class S>
void append(std::vector<T>& to, std::span<S> from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

TrajectoryBuffer::TrajectoryBuffer(std::int64_t max_tokens, std::int64_t max_trajectories, std::uint64_t seed)
    : max_tokens_(at_least("max_tokens", max_tokens, 2)),  // the shortest trajectory: one observed, one sampled
      max_trajectories_(at_least("max_trajectories", max_trajectories, 1)),
      sampler_(CounterRng(seed)) {}

std::unique_ptr<TrajectoryBuffer> TrajectoryBuffer::restore(const BufferState& state) {
  auto buffer = std::make_unique<TrajectoryBuffer>(state.max_tokens, state.max_trajectories, state.seed);
  state.check();
  buffer->sampler_ = UniformSampler(CounterRng(state.seed, state.counter));
  buffer->first_trajectory_id_ = state.first_trajectory_id;
  buffer->first_turn_id_ = state.first_turn_id;

  const std::span tokens(state.tokens);
  const std::span logprobs(state.rollout_logprobs);
  std::size_t token = 0, turn = 0, sampled = 0;
  for (std::size_t i = 0; i < state.num_turns.size(); ++i) {
    const auto num_turns = static_cast<std::size_t>(state.num_turns[i]);
    const auto num_tokens = static_cast<std::size_t>(state.num_tokens[i]);
    const std::span action_lengths = std::span(state.action_lengths).subspan(turn, num_turns);
    const auto num_sampled = std::accumulate(action_lengths.begin(), action_lengths.end(), std::size_t{0});
    NewTrajectory trajectory{.tokens = tokens.subspan(token, num_tokens),
                             .observation_lengths = std::span(state.observation_lengths).subspan(turn, num_turns),
                             .action_lengths = action_lengths,
                             .rollout_logprobs = logprobs.subspan(sampled, num_sampled),
                             .rewards = std::span(state.rewards).subspan(turn, num_turns),
                             .policy_versions = std::span(state.policy_versions).subspan(turn, num_turns),
                             .terminated = state.terminated[i] != 0,
                             .truncated = state.truncated[i] != 0,
                             .task_id = state.task_ids[i]};
    try {
      buffer->push(trajectory);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(concat("trajectory ", i, " of ", state.num_turns.size(), ": ", error.what()));
    }
    token += num_tokens;
    turn += num_turns;
    sampled += num_sampled;
  }
  assert(buffer->first_trajectory_id_ == state.first_trajectory_id);  // state.check() left nothing to evict
  buffer->priorities_ = TurnPriorities(state.first_turn_id, state.priorities, state.max_priority);
  return buffer;
}

BufferState TrajectoryBuffer::state() const {
  const ReadLock lock(mutex_);
  return state_from(first_trajectory_id_);
}

BufferState TrajectoryBuffer::state_since(std::int64_t first_trajectory_id) const {
  const ReadLock lock(mutex_);
  const IdRange live = live_trajectories();
  if (first_trajectory_id > live.end) {
    throw std::out_of_range(
        concat("first_trajectory_id: wanted at most the next id, ", live.end, ", got ", first_trajectory_id));
  }
  return state_from(std::max(first_trajectory_id, live.first));
}

BufferState TrajectoryBuffer::state_from(std::int64_t first_trajectory_id) const {
  const IdRange live = live_trajectories();
  BufferState state;
  state.max_tokens = max_tokens_;
  state.max_trajectories = max_trajectories_;
  state.seed = sampler_.rng().seed();
  state.counter = sampler_.rng().counter();
  state.first_trajectory_id = first_trajectory_id_;
  state.first_turn_id = first_turn_id_;
  state.max_priority = priorities_.max_seen();
  if (first_trajectory_id < live.end) state.priorities = priorities_.from(stored(first_trajectory_id).first_turn_id);
  if (first_trajectory_id == live.first) state.tokens.reserve(static_cast<std::size_t>(num_tokens_));
  for (std::int64_t id = first_trajectory_id; id < live.end; ++id) {
    const Stored& trajectory = stored(id);
    const TrajectoryView seen = view(trajectory);
    append(state.tokens, seen.tokens);
    append(state.rollout_logprobs, seen.rollout_logprobs);
    for (const TurnRecord& turn : seen.turns) {
      state.observation_lengths.push_back(turn.action_begin - turn.observation_begin);
      state.action_lengths.push_back(turn.action_end - turn.action_begin);
      state.rewards.push_back(turn.reward);
      state.policy_versions.push_back(turn.policy_version);
    }
    state.num_tokens.push_back(trajectory.num_tokens);
    state.num_turns.push_back(trajectory.num_turns);
    state.terminated.push_back(trajectory.terminated ? 1 : 0);
    state.truncated.push_back(trajectory.terminated ? 0 : 1);
    state.task_ids.push_back(trajectory.task_id);
  }
  return state;
}

std::int64_t TrajectoryBuffer::push(const NewTrajectory& trajectory) {
  trajectory.check();
  if (std::ssize(trajectory.tokens) > max_tokens_) {
    throw std::invalid_argument(
        concat("tokens: wanted at most max_tokens = ", max_tokens_, ", got ", trajectory.tokens.size()));
  }
  const WriteLock lock(mutex_);
  return push_locked(trajectory);
}

std::int64_t TrajectoryBuffer::push_locked(const NewTrajectory& trajectory) {
  const std::size_t num_turns = trajectory.observation_lengths.size();
  const std::size_t num_words = trajectory.tokens.size() + trajectory.rollout_logprobs.size();
  const std::int64_t id = live_trajectories().end;
  const auto [min_version, max_version] =
      std::minmax_element(trajectory.policy_versions.begin(), trajectory.policy_versions.end());
  const Stored record{.block = nullptr,
                      .first_turn_id = live_turns().end,
                      .min_version = *min_version,
                      .max_version = *max_version,
                      .num_turns = static_cast<std::int32_t>(num_turns),
                      .num_tokens = static_cast<std::int32_t>(trajectory.tokens.size()),
                      .num_action_tokens = static_cast<std::int32_t>(trajectory.rollout_logprobs.size()),
                      .task_id = trajectory.task_id,
                      .terminated = trajectory.terminated};

  // All that can throw comes first, so that a failure leaves nothing half pushed.
  const std::size_t old_num_turns = turn_owners_.size();
  const std::size_t old_num_trajectories = trajectories_.size();
  std::byte* block = nullptr;
  bool are_counted = false;
  try {
    turn_owners_.insert(turn_owners_.end(), num_turns, id);
    trajectories_.push_back(record);
    priorities_.reserve(std::ssize(trajectory.rewards));
    versions_.add(trajectory.policy_versions, id);
    are_counted = true;
    block = arena_.allocate(num_turns * sizeof(TurnRecord) + num_words * sizeof(std::int32_t));
  } catch (...) {
    turn_owners_.resize(old_num_turns);
    trajectories_.resize(old_num_trajectories);
    if (are_counted) {
      for (const std::int64_t version : trajectory.policy_versions) versions_.remove(version, 1);
    }
    throw;
  }
  trajectories_.back().block = block;
  priorities_.push_back(std::ssize(trajectory.rewards));

  auto* const turns = reinterpret_cast<TurnRecord*>(block);
  auto* const tokens = reinterpret_cast<std::int32_t*>(turns + num_turns);
  auto* const logprobs = reinterpret_cast<float*>(tokens + trajectory.tokens.size());
  std::int32_t begin = 0;
  for (std::size_t i = 0; i < num_turns; ++i) {
    const std::int32_t action_begin = begin + trajectory.observation_lengths[i];
    const std::int32_t action_end = action_begin + trajectory.action_lengths[i];
    turns[i] = TurnRecord{.policy_version = trajectory.policy_versions[i],
                          .observation_begin = begin,
                          .action_begin = action_begin,
                          .action_end = action_end,
                          .reward = trajectory.rewards[i]};
    begin = action_end;
  }
  std::copy(trajectory.tokens.begin(), trajectory.tokens.end(), tokens);
  std::copy(trajectory.rollout_logprobs.begin(), trajectory.rollout_logprobs.end(), logprobs);

  num_tokens_ += std::ssize(trajectory.tokens);
  while (num_tokens_ > max_tokens_ || std::ssize(trajectories_) > max_trajectories_) evict_oldest();
  return id;
}

void TrajectoryBuffer::evict_oldest() noexcept {
  const Stored& oldest = trajectories_.front();
  num_tokens_ -= oldest.num_tokens;
  first_turn_id_ += oldest.num_turns;
  turn_owners_.erase(turn_owners_.begin(), turn_owners_.begin() + oldest.num_turns);
  priorities_.pop_front(oldest.num_turns);
  if (oldest.min_version == oldest.max_version) {
    versions_.remove(oldest.min_version, oldest.num_turns);
  } else {
    for (const TurnRecord& turn : view(oldest).turns) versions_.remove(turn.policy_version, 1);
  }
  arena_.release_oldest();
  trajectories_.pop_front();
  ++first_trajectory_id_;
}

IdRange TrajectoryBuffer::live_trajectories() const noexcept {
  return {first_trajectory_id_, first_trajectory_id_ + std::ssize(trajectories_)};
}

IdRange TrajectoryBuffer::live_turns() const noexcept {
  return {first_turn_id_, first_turn_id_ + std::ssize(turn_owners_)};
}

std::int64_t TrajectoryBuffer::num_trajectories() const { return trajectory_range().size(); }

std::int64_t TrajectoryBuffer::num_turns() const { return turn_range().size(); }

std::int64_t TrajectoryBuffer::num_tokens() const {
  const ReadLock lock(mutex_);
  return num_tokens_;
}

std::int64_t TrajectoryBuffer::num_evicted() const { return trajectory_range().first; }

IdRange TrajectoryBuffer::trajectory_range() const {
  const ReadLock lock(mutex_);
  return live_trajectories();
}

IdRange TrajectoryBuffer::turn_range() const {
  const ReadLock lock(mutex_);
  return live_turns();
}

const TrajectoryBuffer::Stored& TrajectoryBuffer::stored(std::int64_t trajectory_id) const {
  return trajectories_[static_cast<std::size_t>(trajectory_id - first_trajectory_id_)];
}

const TrajectoryBuffer::Stored& TrajectoryBuffer::owner_of(std::int64_t turn_id) const {
  return stored(turn_owners_[static_cast<std::size_t>(turn_id - first_turn_id_)]);
}

TrajectoryView TrajectoryBuffer::view(const Stored& trajectory) noexcept {
  const auto* const turns = reinterpret_cast<const TurnRecord*>(trajectory.block);
  const auto* const tokens = reinterpret_cast<const std::int32_t*>(turns + trajectory.num_turns);
  const auto* const logprobs = reinterpret_cast<const float*>(tokens + trajectory.num_tokens);
  return {.turns = {turns, static_cast<std::size_t>(trajectory.num_turns)},
          .tokens = {tokens, static_cast<std::size_t>(trajectory.num_tokens)},
          .rollout_logprobs = {logprobs, static_cast<std::size_t>(trajectory.num_action_tokens)},
          .terminated = trajectory.terminated};
}

std::vector<TrajectoryView> TrajectoryBuffer::views(std::span<const std::int64_t> trajectory_ids) const {
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  std::vector<TrajectoryView> views;
  views.reserve(trajectory_ids.size());
  for (const std::int64_t id : trajectory_ids) views.push_back(view(stored(id)));
  return views;
}

void TrajectoryBuffer::trajectory_of(std::span<const std::int64_t> turn_ids,
                                     std::span<std::int64_t> trajectory_ids) const {
  check_length("trajectory_ids", trajectory_ids.size(), turn_ids.size());
  const ReadLock lock(mutex_);
  check_live("turn_ids", turn_ids, live_turns());
  std::transform(turn_ids.begin(), turn_ids.end(), trajectory_ids.begin(),
                 [this](std::int64_t id) { return turn_owners_[static_cast<std::size_t>(id - first_turn_id_)]; });
}

void TrajectoryBuffer::turn_span(std::span<const std::int64_t> trajectory_ids, std::span<std::int64_t> first_turn_ids,
                                 std::span<std::int64_t> num_turns) const {
  check_length("first_turn_ids", first_turn_ids.size(), trajectory_ids.size());
  check_length("num_turns", num_turns.size(), trajectory_ids.size());
  const ReadLock lock(mutex_);
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  for (std::size_t i = 0; i < trajectory_ids.size(); ++i) {
    const Stored& trajectory = stored(trajectory_ids[i]);
    first_turn_ids[i] = trajectory.first_turn_id;
    num_turns[i] = trajectory.num_turns;
  }
}

void TrajectoryBuffer::turn_records(std::span<const std::int64_t> turn_ids, const TurnColumns& out) const {
  check_length("rewards", out.rewards.size(), turn_ids.size());
  check_length("turn", out.turn.size(), turn_ids.size());
  check_length("is_last", out.is_last.size(), turn_ids.size());
  check_length("terminated", out.terminated.size(), turn_ids.size());
  check_length("truncated", out.truncated.size(), turn_ids.size());
  const ReadLock lock(mutex_);
  check_live("turn_ids", turn_ids, live_turns());
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    const Stored& trajectory = owner_of(turn_ids[i]);
    const std::int64_t turn = turn_ids[i] - trajectory.first_turn_id;
    const bool is_last = turn + 1 == trajectory.num_turns;
    out.rewards[i] = view(trajectory).turns[static_cast<std::size_t>(turn)].reward;
    out.turn[i] = static_cast<std::int32_t>(turn);
    out.is_last[i] = is_last;
    out.terminated[i] = is_last && trajectory.terminated;
    out.truncated[i] = is_last && !trajectory.terminated;
  }
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
