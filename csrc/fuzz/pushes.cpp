// All the ways into the buffer.
#include <algorithm>

#include "open_trajectory.h"
#include "operations.h"
#include "trajectory_columns.h"

namespace archer_fast::fuzzing {
namespace {

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

void push_one(Bench& bench) {
  const PlainTrajectory game = any_trajectory(bench.input, bench.plain.options.vocab_size);
  std::int64_t id = -1;
  const std::int64_t next_id = bench.plain.trajectory_range().end;
  const bool was_pushed = goes_through([&] { id = bench.buffer->push(game.view()); });
  require(was_pushed == game.fits(bench.plain.options));
  if (!was_pushed) return;
  require(id == next_id);
  bench.plain.push(game);
}

// The fields of TrajectoryColumns, owned.
struct PlainColumns {
  std::vector<std::int32_t> tokens, num_tokens, num_turns, observation_lengths, action_lengths;
  std::vector<float> rollout_logprobs, rewards;
  std::vector<std::int64_t> policy_versions;
  std::vector<std::uint8_t> terminated, truncated;
  std::vector<std::int32_t> task_ids;

  void add(const PlainTrajectory& game) {
    append(tokens, game.tokens);
    append(observation_lengths, game.observation_lengths);
    append(action_lengths, game.action_lengths);
    append(rollout_logprobs, game.rollout_logprobs);
    append(rewards, game.rewards);
    append(policy_versions, game.policy_versions);
    num_tokens.push_back(static_cast<std::int32_t>(game.tokens.size()));
    num_turns.push_back(static_cast<std::int32_t>(game.rewards.size()));
    terminated.push_back(game.terminated ? 1 : 0);
    truncated.push_back(game.truncated ? 1 : 0);
    task_ids.push_back(game.task_id);
  }

  void damage_one(FuzzInput& input) {
    switch (input.below(11)) {
      case 0:
        damage(input, tokens);
        break;
      case 1:
        damage(input, num_tokens);
        break;
      case 2:
        damage(input, num_turns);
        break;
      case 3:
        damage(input, observation_lengths);
        break;
      case 4:
        damage(input, action_lengths);
        break;
      case 5:
        damage(input, rollout_logprobs);
        break;
      case 6:
        damage(input, rewards);
        break;
      case 7:
        damage(input, policy_versions);
        break;
      case 8:
        damage(input, terminated);
        break;
      case 9:
        damage(input, truncated);
        break;
      default:
        damage(input, task_ids);
        break;
    }
  }

  // What trajectory_columns.h asks of lengths and sums.
  bool are_whole() const {
    const auto sum = [](const std::vector<std::int32_t>& counts) {
      std::int64_t total = 0;
      for (const std::int32_t count : counts) {
        if (count < 1) return std::int64_t{-1};
        total += count;
      }
      return total;
    };
    const auto is = [](const auto& items, std::int64_t wanted) { return std::ssize(items) == wanted; };
    const std::int64_t size = std::ssize(num_turns), turns = sum(num_turns);
    const auto are_flags = [](const std::vector<std::uint8_t>& bytes) {
      return std::all_of(bytes.begin(), bytes.end(), [](std::uint8_t byte) { return byte <= 1; });
    };
    return are_flags(terminated) && are_flags(truncated) && is(num_tokens, size) && is(terminated, size) &&
           is(truncated, size) && is(task_ids, size) && is(observation_lengths, turns) && is(action_lengths, turns) &&
           is(rewards, turns) && is(policy_versions, turns) && is(tokens, sum(num_tokens)) &&
           is(rollout_logprobs, sum(action_lengths));
  }
};

void push_many(Bench& bench) {
  FuzzInput& input = bench.input;
  PlainColumns plain;
  for (std::size_t i = input.below(5); i > 0; --i) plain.add(whole_trajectory(input, bench.plain.options.vocab_size));
  while (input.once_in(4)) plain.damage_one(input);
  const TrajectoryColumns columns{.tokens = plain.tokens,
                                  .num_tokens = plain.num_tokens,
                                  .num_turns = plain.num_turns,
                                  .observation_lengths = plain.observation_lengths,
                                  .action_lengths = plain.action_lengths,
                                  .rollout_logprobs = plain.rollout_logprobs,
                                  .rewards = plain.rewards,
                                  .policy_versions = plain.policy_versions,
                                  .terminated = plain.terminated,
                                  .truncated = plain.truncated,
                                  .task_ids = plain.task_ids};
  std::vector<PlainTrajectory> games;
  bool is_possible = plain.are_whole();
  if (is_possible) games = cut(columns);
  for (const PlainTrajectory& game : games) is_possible = is_possible && game.fits(bench.plain.options);

  const std::int64_t next_id = bench.plain.trajectory_range().end;
  IdRange ids{-1, -1};
  require(goes_through([&] { ids = bench.buffer->extend(columns); }) == is_possible);
  if (!is_possible) return;
  require(ids.first == next_id && ids.size() == std::ssize(games));
  for (const PlainTrajectory& game : games) bench.plain.push(game);
}

// One exchange as a trajectory of one turn.
PlainTrajectory any_turn(FuzzInput& input, std::int64_t vocab_size) {
  const PlainTrajectory whole = whole_trajectory(input, vocab_size);
  const auto part = [](const auto& items, std::int32_t begin, std::int32_t end) {
    return std::vector(items.begin() + begin, items.begin() + end);
  };
  const std::int32_t action_begin = whole.observation_lengths[0], action_end = action_begin + whole.action_lengths[0];
  std::vector<std::int32_t> observation = part(whole.tokens, 0, action_begin);
  std::vector<std::int32_t> action = part(whole.tokens, action_begin, action_end);
  PlainTrajectory turn{.rollout_logprobs = part(whole.rollout_logprobs, 0, whole.action_lengths[0]),
                       .rewards = {whole.rewards[0]},
                       .policy_versions = {whole.policy_versions[0]}};
  if (input.once_in(8)) damage(input, observation);
  if (input.once_in(8)) damage(input, action);
  if (input.once_in(8)) damage(input, turn.rollout_logprobs);
  if (input.once_in(8)) turn.rewards[0] = input.edge<float>();
  turn.observation_lengths = {static_cast<std::int32_t>(observation.size())};
  turn.action_lengths = {static_cast<std::int32_t>(action.size())};
  turn.tokens = observation;
  append(turn.tokens, action);
  return turn;
}

// A game that is being played, twice.
struct OpenGame {
  OpenTrajectory open;
  PlainTrajectory plain;

  void add_turn(FuzzInput& input, const BufferOptions& options) {
    const PlainTrajectory turn = any_turn(input, options.vocab_size);
    const auto num_observed = static_cast<std::size_t>(turn.observation_lengths[0]);
    const Block<std::int32_t> tokens(turn.tokens);
    const Block<float> logprobs(turn.rollout_logprobs);
    const bool was_added = goes_through([&] {
      open.add_turn(tokens.span().first(num_observed), tokens.span().subspan(num_observed), logprobs.span(),
                    turn.rewards[0], turn.policy_versions[0]);
    });
    require(was_added == turn.fits({.max_tokens = 1000, .vocab_size = options.vocab_size}));  // as yet no limit
    if (was_added) {
      append(plain.tokens, turn.tokens);
      append(plain.observation_lengths, turn.observation_lengths);
      append(plain.action_lengths, turn.action_lengths);
      append(plain.rollout_logprobs, turn.rollout_logprobs);
      append(plain.rewards, turn.rewards);
      append(plain.policy_versions, turn.policy_versions);
    }
    require(open.num_turns() == std::ssize(plain.rewards));
  }

  void end(Bench& bench) {
    std::vector<std::int32_t> final_observation(bench.input.below(4), 7);
    if (bench.input.once_in(8)) damage(bench.input, final_observation);
    const std::size_t ends = bench.input.byte();
    PlainTrajectory game = plain;
    append(game.tokens, final_observation);
    game.terminated = ends % 8 != 0 && ends % 2 == 0;
    game.truncated = ends % 8 != 2 && !game.terminated;

    const std::int64_t next_id = bench.plain.trajectory_range().end;
    std::int64_t id = -1;
    const bool was_pushed =
        goes_through([&] { id = bench.buffer->push(open.close(final_observation, game.terminated, game.truncated)); });
    require(was_pushed == game.fits(bench.plain.options));
    if (!was_pushed) return;
    require(id == next_id);
    bench.plain.push(game);
  }
};

// Some games at a time; one that was pushed may go on, and be pushed longer than before.
void push_turn_by_turn(Bench& bench) {
  FuzzInput& input = bench.input;
  std::vector<OpenGame> games;
  for (std::size_t i = 1 + input.below(3); i > 0; --i) {
    const auto task_id = static_cast<std::int32_t>(input.below(4));
    games.push_back({OpenTrajectory(bench.plain.options.vocab_size, task_id), {.task_id = task_id}});
  }
  for (std::size_t steps = input.below(16); steps > 0; --steps) {
    OpenGame& game = games[input.below(games.size())];
    if (input.once_in(4)) {
      game.end(bench);
    } else {
      game.add_turn(input, bench.plain.options);
    }
  }
}

// The buffer gives way to one that goes on from its state, without features.
void restore(Bench& bench) {
  const BufferState state = bench.buffer->state();
  bench.buffer = TrajectoryBuffer::restore(state);
  bench.plain.features.assign(bench.plain.games.size(), {});
  bench.plain.features_stamp = 0;
}

}  // namespace

void push_something(Bench& bench, std::size_t choice) {
  switch (choice % 8) {
    case 0:
      restore(bench);
      break;
    case 1:
      push_turn_by_turn(bench);
      break;
    case 2:
    case 3:
      push_many(bench);
      break;
    default:
      push_one(bench);
      break;
  }
}

}  // namespace archer_fast::fuzzing
