#include "trajectory_buffer.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "collation.h"
#include "concat.h"

namespace archer_fast {
namespace {

// The arena hands out bytes; these types may begin their life in them, one after the other.
static_assert(std::is_trivially_copyable_v<TurnRecord> && alignof(TurnRecord) <= ChunkArena::kAlignment);
static_assert(sizeof(TurnRecord) % alignof(float) == 0 && alignof(float) % alignof(std::int32_t) == 0);

}  // namespace

TrajectoryBuffer::TrajectoryBuffer(const BufferOptions& options, const FeatureMemory& memory)
    : options_((options.check(), memory.check(), options)),
      is_narrow_(options.vocab_size > 0 && options.vocab_size <= TokenSpan::kMaxNarrowVocabulary),
      sampler_(CounterRng(options.seed)) {
  if (options.feature_bytes > 0) {
    features_.emplace(static_cast<std::size_t>(options.feature_bytes),
                      static_cast<std::size_t>(memory.max_feature_memory), memory.feature_folder);
  }
}

std::unique_ptr<TrajectoryBuffer> TrajectoryBuffer::restore(const BufferState& state, const FeatureMemory& memory) {
  state.check();
  auto buffer = std::make_unique<TrajectoryBuffer>(state.options, memory);
  buffer->sampler_ = UniformSampler(CounterRng(state.options.seed, state.counter));
  buffer->first_trajectory_id_ = state.first_trajectory_id;
  buffer->first_turn_id_ = buffer->end_turn_id_ = state.first_turn_id;
  buffer->extend(state.columns());
  assert(buffer->first_trajectory_id_ == state.first_trajectory_id);  // state.check() left nothing to evict
  buffer->priorities_ = TurnPriorities(state.first_turn_id, state.priorities, state.max_priority);
  return buffer;
}

BufferState TrajectoryBuffer::state() const {
  const ReadLock lock(mutex_);
  return state_from(first_trajectory_id_);
}

BufferSnapshot TrajectoryBuffer::snapshot(std::int64_t first_trajectory_id) const {
  const ReadLock lock(mutex_);
  const IdRange live = live_trajectories();
  if (first_trajectory_id > live.end) {
    throw std::out_of_range(
        concat("first_trajectory_id: wanted at most the next id, ", live.end, ", got ", first_trajectory_id));
  }
  BufferSnapshot snapshot{.since = state_from(std::max(first_trajectory_id, live.first)),
                          .priorities = priorities_.from(first_turn_id_),
                          .num_turns = std::vector<std::int64_t>(trajectories_.size())};
  std::transform(trajectories_.begin(), trajectories_.end(), snapshot.num_turns.begin(),
                 [](const Stored& trajectory) { return trajectory.num_turns; });
  return snapshot;
}

BufferState TrajectoryBuffer::state_from(std::int64_t first_trajectory_id) const {
  const IdRange live = live_trajectories();
  BufferState state;
  state.options = options_;
  state.counter = sampler_.rng().counter();
  state.first_trajectory_id = first_trajectory_id_;
  state.first_turn_id = first_turn_id_;
  state.max_priority = priorities_.max_seen();
  if (first_trajectory_id < live.end) state.priorities = priorities_.from(stored(first_trajectory_id).first_turn_id);
  if (first_trajectory_id == live.first) state.tokens.reserve(static_cast<std::size_t>(num_tokens_));
  for (std::int64_t id = first_trajectory_id; id < live.end; ++id) {
    const Stored& trajectory = stored(id);
    const TrajectoryView seen = view(trajectory);
    const std::size_t num_tokens = state.tokens.size();
    state.tokens.resize(num_tokens + static_cast<std::size_t>(seen.tokens.size()));
    seen.tokens.copy(state.tokens.data() + num_tokens);
    state.rollout_logprobs.insert(state.rollout_logprobs.end(), seen.rollout_logprobs.begin(),
                                  seen.rollout_logprobs.end());
    for (std::size_t i = 0; i < seen.turns.size(); ++i) {
      const TurnRecord& turn = seen.turns[i];
      state.observation_lengths.push_back(turn.action_begin - seen.observation_begin(i));
      state.action_lengths.push_back(seen.num_action_tokens(i));
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

void TrajectoryBuffer::check(const NewTrajectory& trajectory) const {
  trajectory.check(options_.vocab_size);
  if (std::ssize(trajectory.tokens) > options_.max_tokens) {
    throw std::invalid_argument(
        concat("tokens: wanted at most max_tokens = ", options_.max_tokens, ", got ", trajectory.tokens.size()));
  }
}

std::int64_t TrajectoryBuffer::push(const NewTrajectory& trajectory) {
  check(trajectory);
  const WriteLock lock(mutex_);
  return push_locked(trajectory);
}

IdRange TrajectoryBuffer::extend(const TrajectoryColumns& trajectories) {
  trajectories.check();
  TrajectoryReader unchecked(trajectories);
  for (std::size_t i = 0; i < trajectories.size(); ++i) {
    try {
      check(unchecked.next());
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(concat("trajectory ", i, " of ", trajectories.size(), ": ", error.what()));
    }
  }
  const WriteLock lock(mutex_);
  const std::int64_t first = live_trajectories().end;
  TrajectoryReader reader(trajectories);
  for (std::size_t i = 0; i < trajectories.size(); ++i) push_locked(reader.next());
  return {first, live_trajectories().end};
}

std::int64_t TrajectoryBuffer::push_locked(const NewTrajectory& trajectory) {
  const std::size_t num_turns = trajectory.observation_lengths.size();
  const std::int64_t id = live_trajectories().end;
  const IdRange turn_ids{end_turn_id_, end_turn_id_ + std::ssize(trajectory.rewards)};
  const auto [min_version, max_version] =
      std::minmax_element(trajectory.policy_versions.begin(), trajectory.policy_versions.end());
  const Stored record{.block = nullptr,
                      .first_turn_id = turn_ids.first,
                      .min_version = *min_version,
                      .max_version = *max_version,
                      .num_turns = static_cast<std::int32_t>(num_turns),
                      .num_tokens = static_cast<std::int32_t>(trajectory.tokens.size()),
                      .num_action_tokens = static_cast<std::int32_t>(trajectory.rollout_logprobs.size()),
                      .task_id = trajectory.task_id,
                      .terminated = trajectory.terminated};

  // All that can throw comes first, so that a failure leaves nothing half pushed.
  const std::size_t old_num_trajectories = trajectories_.size();
  std::byte* block = nullptr;
  bool are_counted = false, have_features = false;
  try {
    owners_.push_back(turn_ids, id);
    trajectories_.push_back(record);
    priorities_.reserve(turn_ids.size());
    versions_.add(trajectory.policy_versions, id);
    are_counted = true;
    if (features_) features_->push(num_turns + 1);
    have_features = features_.has_value();
    block = arena_.allocate(num_turns * sizeof(TurnRecord) + trajectory.rollout_logprobs.size() * sizeof(float) +
                            trajectory.tokens.size() * TokenSpan::width(is_narrow_));
  } catch (...) {
    owners_.truncate(end_turn_id_);
    trajectories_.resize(old_num_trajectories);
    if (are_counted) {
      for (const std::int64_t version : trajectory.policy_versions) versions_.remove(version, 1);
    }
    if (have_features) features_->pop_newest();
    throw;
  }
  trajectories_.back().block = block;
  priorities_.push_back(turn_ids.size());
  write_block(trajectory, block);

  end_turn_id_ = turn_ids.end;
  num_tokens_ += std::ssize(trajectory.tokens);
  while (num_tokens_ > options_.max_tokens || std::ssize(trajectories_) > options_.max_trajectories) evict_oldest();
  return id;
}

void TrajectoryBuffer::write_block(const NewTrajectory& trajectory, std::byte* block) const noexcept {
  const std::size_t num_turns = trajectory.observation_lengths.size();
  auto* const turns = reinterpret_cast<TurnRecord*>(block);
  auto* const logprobs = reinterpret_cast<float*>(turns + num_turns);
  auto* const tokens = reinterpret_cast<std::byte*>(logprobs + trajectory.rollout_logprobs.size());
  std::int32_t begin = 0, first_logprob = 0;
  for (std::size_t i = 0; i < num_turns; ++i) {
    turns[i] = TurnRecord{.policy_version = trajectory.policy_versions[i],
                          .action_begin = begin + trajectory.observation_lengths[i],
                          .first_logprob = first_logprob,
                          .reward = trajectory.rewards[i],
                          .monte_carlo_return = 0.0F};
    begin = turns[i].action_begin + trajectory.action_lengths[i];
    first_logprob += trajectory.action_lengths[i];
  }
  double rest = 0.0;
  for (std::size_t i = num_turns; i-- > 0;) {
    rest = double{trajectory.rewards[i]} + options_.gamma * rest;
    turns[i].monte_carlo_return = static_cast<float>(rest);
  }
  std::copy(trajectory.rollout_logprobs.begin(), trajectory.rollout_logprobs.end(), logprobs);
  if (is_narrow_) {
    std::transform(trajectory.tokens.begin(), trajectory.tokens.end(), reinterpret_cast<std::uint16_t*>(tokens),
                   [](std::int32_t token) { return static_cast<std::uint16_t>(token); });
  } else {
    std::copy(trajectory.tokens.begin(), trajectory.tokens.end(), reinterpret_cast<std::int32_t*>(tokens));
  }
}

void TrajectoryBuffer::evict_oldest() noexcept {
  const Stored& oldest = trajectories_.front();
  num_tokens_ -= oldest.num_tokens;
  first_turn_id_ += oldest.num_turns;
  owners_.pop_front(first_turn_id_);
  priorities_.pop_front(oldest.num_turns);
  if (oldest.min_version == oldest.max_version) {
    versions_.remove(oldest.min_version, oldest.num_turns);
  } else {
    for (const TurnRecord& turn : view(oldest).turns) versions_.remove(turn.policy_version, 1);
  }
  arena_.release_oldest();
  if (features_) features_->pop_oldest();
  trajectories_.pop_front();
  ++first_trajectory_id_;
}

IdRange TrajectoryBuffer::live_trajectories() const noexcept {
  return {first_trajectory_id_, first_trajectory_id_ + std::ssize(trajectories_)};
}

IdRange TrajectoryBuffer::live_turns() const noexcept { return {first_turn_id_, end_turn_id_}; }

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

std::int64_t TrajectoryBuffer::search_from(std::int64_t turn_id) const {
  return std::max(owners_.search_from(turn_id), first_trajectory_id_);
}

std::int64_t TrajectoryBuffer::owner_id(std::int64_t turn_id) const {
  std::int64_t id = search_from(turn_id);
  while (stored(id).first_turn_id + stored(id).num_turns <= turn_id) ++id;
  return id;
}

TrajectoryView TrajectoryBuffer::view(const Stored& trajectory) const noexcept {
  const auto* const turns = reinterpret_cast<const TurnRecord*>(trajectory.block);
  const auto* const logprobs = reinterpret_cast<const float*>(turns + trajectory.num_turns);
  const auto* const tokens = reinterpret_cast<const std::byte*>(logprobs + trajectory.num_action_tokens);
  return {.turns = {turns, static_cast<std::size_t>(trajectory.num_turns)},
          .tokens = {tokens, trajectory.num_tokens, is_narrow_},
          .rollout_logprobs = {logprobs, static_cast<std::size_t>(trajectory.num_action_tokens)},
          .terminated = trajectory.terminated};
}

void TrajectoryBuffer::trajectory_of(std::span<const std::int64_t> turn_ids,
                                     std::span<std::int64_t> trajectory_ids) const {
  check_length("trajectory_ids", trajectory_ids.size(), std::ssize(turn_ids));
  const ReadLock lock(mutex_);
  check_live("turn_ids", turn_ids, live_turns());
  std::transform(turn_ids.begin(), turn_ids.end(), trajectory_ids.begin(),
                 [this](std::int64_t id) { return owner_id(id); });
}

void TrajectoryBuffer::turn_span(std::span<const std::int64_t> trajectory_ids, std::span<std::int64_t> first_turn_ids,
                                 std::span<std::int64_t> num_turns) const {
  check_length("first_turn_ids", first_turn_ids.size(), std::ssize(trajectory_ids));
  check_length("num_turns", num_turns.size(), std::ssize(trajectory_ids));
  const ReadLock lock(mutex_);
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  for (std::size_t i = 0; i < trajectory_ids.size(); ++i) {
    const Stored& trajectory = stored(trajectory_ids[i]);
    first_turn_ids[i] = trajectory.first_turn_id;
    num_turns[i] = trajectory.num_turns;
  }
}

void TrajectoryBuffer::lengths(std::span<const std::int64_t> trajectory_ids, std::span<std::int64_t> num_tokens) const {
  check_length("num_tokens", num_tokens.size(), std::ssize(trajectory_ids));
  const ReadLock lock(mutex_);
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  std::transform(trajectory_ids.begin(), trajectory_ids.end(), num_tokens.begin(),
                 [this](std::int64_t id) { return stored(id).num_tokens; });
}

void TrajectoryBuffer::turn_records(std::span<const std::int64_t> turn_ids, const TurnColumns& out) const {
  check_length("rewards", out.rewards.size(), std::ssize(turn_ids));
  check_length("turn", out.turn.size(), std::ssize(turn_ids));
  check_length("is_last", out.is_last.size(), std::ssize(turn_ids));
  check_length("terminated", out.terminated.size(), std::ssize(turn_ids));
  check_length("truncated", out.truncated.size(), std::ssize(turn_ids));
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

}  // namespace archer_fast
