// Any state: it is refused, or the buffer made of it holds that state and goes on as every other buffer does.
#include <limits>

#include "operations.h"

using archer_fast::BufferState;
using archer_fast::TrajectoryBuffer;
using namespace archer_fast::fuzzing;

namespace {

// What a buffer could have given, and room for some more.
BufferState whole_state(FuzzInput& input) {
  constexpr std::int64_t kVocabularies[] = {0, 50257, 65537, 1};
  constexpr std::int64_t kRows[] = {0, 0, 0, 0, 0, 0, 3, 40};
  PlainBuffer plain({.max_tokens = std::numeric_limits<std::int64_t>::max(),
                     .max_trajectories = std::numeric_limits<std::int64_t>::max(),
                     .seed = input.byte(),
                     .vocab_size = kVocabularies[input.below(4)],
                     .gamma = static_cast<double>(input.byte()) / 255.0,
                     .feature_bytes = kRows[input.below(8)]});
  plain.counter = input.byte();
  plain.first_trajectory_id = input.byte();
  plain.first_turn_id = input.byte() * 8;
  plain.max_priority = 1.0 + input.byte();
  for (std::size_t i = input.below(6); i > 0; --i) plain.push(whole_trajectory(input, plain.options.vocab_size));
  if (input.below(2) == 1) {
    for (double& priority : plain.priorities) priority = static_cast<double>(input.byte()) / 256.0;
  }
  BufferState state = plain.state_since(0);
  state.options.max_tokens = std::max<std::int64_t>(2, std::ssize(state.tokens)) + input.byte();
  state.options.max_trajectories =
      std::max<std::int64_t>(1, std::ssize(state.num_turns)) + static_cast<std::int64_t>(input.below(4));
  return state;
}

// Arrays of any lengths and numbers.
BufferState any_state(FuzzInput& input) {
  BufferState state = whole_state(input);
  const auto fill = [&](auto& items) {
    using Item = std::decay_t<decltype(items[0])>;
    items.resize(input.below(64));
    for (Item& item : items) item = input.edge<Item>();
  };
  fill(state.num_turns), fill(state.num_tokens), fill(state.terminated), fill(state.truncated), fill(state.task_ids);
  fill(state.observation_lengths), fill(state.action_lengths), fill(state.rewards), fill(state.policy_versions);
  fill(state.priorities), fill(state.tokens), fill(state.rollout_logprobs);
  return state;
}

void damage_one(FuzzInput& input, BufferState& state) {
  switch (input.below(22)) {
    case 0:
      state.options.max_tokens = input.edge<std::int64_t>();
      break;
    case 1:
      state.options.max_trajectories = input.edge<std::int64_t>();
      break;
    case 2:
      state.options.seed = input.edge<std::uint64_t>();
      break;
    case 3:
      state.options.vocab_size = input.edge<std::int64_t>();
      break;
    case 4:
      state.options.gamma = input.edge<double>();
      break;
    case 5:
      state.counter = input.edge<std::uint64_t>();
      break;
    case 6:
      state.first_trajectory_id = input.edge<std::int64_t>();
      break;
    case 7:
      state.first_turn_id = input.edge<std::int64_t>();
      break;
    case 8:
      state.max_priority = input.edge<double>();
      break;
    case 9:
      damage(input, state.tokens);
      break;
    case 10:
      damage(input, state.rollout_logprobs);
      break;
    case 11:
      damage(input, state.observation_lengths);
      break;
    case 12:
      damage(input, state.action_lengths);
      break;
    case 13:
      damage(input, state.rewards);
      break;
    case 14:
      damage(input, state.policy_versions);
      break;
    case 15:
      damage(input, state.priorities);
      break;
    case 16:
      damage(input, state.num_tokens);
      break;
    case 17:
      damage(input, state.num_turns);
      break;
    case 18:
      damage(input, state.terminated);
      break;
    case 19:
      damage(input, state.truncated);
      break;
    case 20:
      state.options.feature_bytes = input.edge<std::int64_t>();
      break;
    default:
      damage(input, state.task_ids);
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzInput input({data, size});
  const std::uint8_t kind = input.byte();
  BufferState state = kind == 255 ? any_state(input) : whole_state(input);
  const int num_damages = kind % 4;
  for (int i = 0; i < num_damages; ++i) damage_one(input, state);

  // What restore may rightly take, and we have no memory for.
  constexpr std::int64_t kMaxRow = 1 << 15;
  if (state.options.feature_bytes > kMaxRow && state.options.feature_bytes <= std::int64_t{1} << 30) return 0;

  std::unique_ptr<TrajectoryBuffer> buffer;
  const bool was_restored = goes_through([&] { buffer = TrajectoryBuffer::restore(state); });
  require(was_restored || kind == 255 || num_damages > 0);
  if (!was_restored) return 0;
  require(are_same(buffer->state(), state));
  Bench bench{input, std::move(buffer), PlainBuffer(state)};
  operate(bench);
  return 0;
}
