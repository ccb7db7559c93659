#include "plain_buffer.h"

#include <algorithm>
#include <map>
#include <utility>

#include "require.h"

namespace archer_fast::fuzzing {
namespace {

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

}  // namespace

std::vector<PlainTrajectory> cut(const TrajectoryColumns& columns) {
  std::vector<PlainTrajectory> games;
  TrajectoryReader reader(columns);
  for (std::size_t i = 0; i < columns.size(); ++i) {
    const NewTrajectory read = reader.next();
    const auto copy = [](auto span) { return std::vector(span.begin(), span.end()); };
    games.push_back({.tokens = copy(read.tokens),
                     .observation_lengths = copy(read.observation_lengths),
                     .action_lengths = copy(read.action_lengths),
                     .rollout_logprobs = copy(read.rollout_logprobs),
                     .rewards = copy(read.rewards),
                     .policy_versions = copy(read.policy_versions),
                     .terminated = read.terminated,
                     .truncated = read.truncated,
                     .task_id = read.task_id});
  }
  return games;
}

PlainBuffer::PlainBuffer(const BufferState& state)
    : options(state.options),
      counter(state.counter),
      first_trajectory_id(state.first_trajectory_id),
      first_turn_id(state.first_turn_id),
      max_priority(state.max_priority),
      priorities(state.priorities.begin(), state.priorities.end()) {
  for (PlainTrajectory& game : cut(state.columns())) games.push_back(std::move(game));
  features.resize(games.size());
}

IdRange PlainBuffer::trajectory_range() const noexcept {
  return {first_trajectory_id, first_trajectory_id + std::ssize(games)};
}

IdRange PlainBuffer::turn_range() const noexcept { return {first_turn_id, first_turn_id + std::ssize(priorities)}; }

BufferState PlainBuffer::state_since(std::int64_t wanted_id) const {
  BufferState state;
  state.options = options;
  state.counter = counter;
  state.first_trajectory_id = first_trajectory_id;
  state.first_turn_id = first_turn_id;
  state.max_priority = max_priority;
  for (std::int64_t id = std::max(wanted_id, first_trajectory_id); id < trajectory_range().end; ++id) {
    const PlainTrajectory& held = game(id);
    append(state.tokens, held.tokens);
    append(state.rollout_logprobs, held.rollout_logprobs);
    append(state.observation_lengths, held.observation_lengths);
    append(state.action_lengths, held.action_lengths);
    append(state.rewards, held.rewards);
    append(state.policy_versions, held.policy_versions);
    state.num_tokens.push_back(static_cast<std::int32_t>(held.tokens.size()));
    state.num_turns.push_back(static_cast<std::int32_t>(held.rewards.size()));
    state.terminated.push_back(held.terminated ? 1 : 0);
    state.truncated.push_back(held.truncated ? 1 : 0);
    state.task_ids.push_back(held.task_id);
  }
  state.priorities.assign(priorities.end() - std::ssize(state.rewards), priorities.end());
  return state;
}

void PlainBuffer::push(const PlainTrajectory& pushed) {
  games.push_back(pushed);
  features.emplace_back();
  priorities.insert(priorities.end(), pushed.rewards.size(), max_priority);
  const auto num_tokens = [this] {
    std::int64_t sum = 0;
    for (const PlainTrajectory& held : games) sum += std::ssize(held.tokens);
    return sum;
  };
  while (num_tokens() > options.max_tokens || std::ssize(games) > options.max_trajectories) {
    const auto num_turns = std::ssize(games.front().rewards);
    priorities.erase(priorities.begin(), priorities.begin() + num_turns);
    first_turn_id += num_turns;
    ++first_trajectory_id;
    games.pop_front();
    features.pop_front();
  }
}

void PlainBuffer::set_features(std::int64_t trajectory_id, std::int64_t trunk_version,
                               std::span<const std::byte> rows) {
  features[index(trajectory_id - first_trajectory_id)] = {
      .trunk_version = trunk_version, .stamp = ++features_stamp, .rows = {rows.begin(), rows.end()}};
}

const PlainTrajectory& PlainBuffer::game(std::int64_t trajectory_id) const {
  return games[index(trajectory_id - first_trajectory_id)];
}

PlainTurn PlainBuffer::turn(std::int64_t turn_id) const {
  std::int64_t id = first_trajectory_id;
  std::size_t rest = index(turn_id - first_turn_id);
  while (rest >= game(id).rewards.size()) rest -= game(id++).rewards.size();
  const PlainTrajectory& owner = game(id);

  PlainTurn turn{.trajectory_id = id, .index = rest, .is_last = rest + 1 == owner.rewards.size()};
  for (std::size_t i = 0; i <= rest; ++i) {
    turn.first_logprob += turn.action_end - turn.action_begin;
    turn.observation_begin = turn.action_end;
    turn.action_begin = turn.observation_begin + index(owner.observation_lengths[i]);
    turn.action_end = turn.action_begin + index(owner.action_lengths[i]);
  }
  turn.next_state_end =
      turn.is_last ? owner.tokens.size() : turn.action_end + index(owner.observation_lengths[rest + 1]);
  return turn;
}

std::int64_t PlainBuffer::first_turn_of(std::int64_t trajectory_id) const {
  std::int64_t id = first_turn_id;
  for (std::int64_t i = first_trajectory_id; i < trajectory_id; ++i) id += std::ssize(game(i).rewards);
  return id;
}

std::vector<float> PlainBuffer::returns(std::int64_t trajectory_id) const {
  const PlainTrajectory& held = game(trajectory_id);
  std::vector<float> returns(held.rewards.size());
  double rest = 0.0;
  for (std::size_t i = returns.size(); i-- > 0;) {
    rest = double{held.rewards[i]} + options.gamma * rest;
    returns[i] = static_cast<float>(rest);
  }
  return returns;
}

const PlainFeatures& PlainBuffer::features_of(std::int64_t trajectory_id) const {
  return features[index(trajectory_id - first_trajectory_id)];
}

std::size_t PlainBuffer::feature_bytes_of(std::int64_t trajectory_id) const {
  return (game(trajectory_id).rewards.size() + 1) * index(options.feature_bytes);
}

std::vector<std::int64_t> PlainBuffer::turns_since(std::int64_t min_policy_version) const {
  std::vector<std::int64_t> turns;
  std::int64_t id = first_turn_id;
  for (const PlainTrajectory& held : games) {
    for (const std::int64_t version : held.policy_versions) {
      if (version >= min_policy_version) turns.push_back(id);
      ++id;
    }
  }
  return turns;
}

std::vector<std::int64_t> PlainBuffer::tasks_of_turns(std::span<const std::int64_t> turn_ids) const {
  std::vector<std::int64_t> tasks;
  for (const std::int64_t id : turn_ids) tasks.push_back(game(turn(id).trajectory_id).task_id);
  return tasks;
}

bool PlainBuffer::can_draw(std::span<const std::int64_t> tasks, std::size_t n, bool replacement, bool by_task) const {
  if (n == 0) return true;
  if (tasks.empty()) return false;
  if (replacement) return true;
  if (n > tasks.size()) return false;
  if (!by_task) return true;
  std::map<std::int64_t, std::size_t> sizes;
  for (const std::int64_t task : tasks) ++sizes[task];
  const std::size_t share = n / sizes.size();
  std::size_t num_larger = 0;
  for (const auto& [task, size] : sizes) {
    if (size < share) return false;
    if (size > share) ++num_larger;
  }
  return num_larger >= n % sizes.size();
}

bool are_same(const BufferState& one, const BufferState& other) {
  const BufferOptions &left = one.options, &right = other.options;
  return left.max_tokens == right.max_tokens && left.max_trajectories == right.max_trajectories &&
         left.seed == right.seed && left.vocab_size == right.vocab_size && left.gamma == right.gamma &&
         left.feature_bytes == right.feature_bytes && one.counter == other.counter &&
         one.first_trajectory_id == other.first_trajectory_id && one.first_turn_id == other.first_turn_id &&
         one.max_priority == other.max_priority && one.tokens == other.tokens &&
         one.rollout_logprobs == other.rollout_logprobs && one.observation_lengths == other.observation_lengths &&
         one.action_lengths == other.action_lengths && one.rewards == other.rewards &&
         one.policy_versions == other.policy_versions && one.priorities == other.priorities &&
         one.num_tokens == other.num_tokens && one.num_turns == other.num_turns && one.terminated == other.terminated &&
         one.truncated == other.truncated && one.task_ids == other.task_ids;
}

void check_same(const TrajectoryBuffer& buffer, const PlainBuffer& plain) {
  const BufferState held = buffer.state();
  require(are_same(held, plain.state_since(plain.first_trajectory_id)));
  const IdRange trajectories = plain.trajectory_range(), turns = plain.turn_range();
  require(buffer.trajectory_range().first == trajectories.first && buffer.trajectory_range().end == trajectories.end);
  require(buffer.turn_range().first == turns.first && buffer.turn_range().end == turns.end);
  require(buffer.num_trajectories() == trajectories.size() && buffer.num_evicted() == trajectories.first);
  require(buffer.num_turns() == turns.size() && buffer.num_tokens() == std::ssize(held.tokens));
  require(buffer.features_stamp() == plain.features_stamp);
}

}  // namespace archer_fast::fuzzing
