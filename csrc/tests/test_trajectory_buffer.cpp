#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <optional>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "example.h"
#include "trajectory_buffer.h"
#include "two_games.h"

using archer_fast::TrajectoryBuffer;
using archer_fast::testing::Example;
using Ids = std::vector<std::int64_t>;

namespace {

// Destinations of a plan, in memory of their own.
template <class Arrays, class Plan>
Arrays destinations(archer_fast::testing::Poisoned& memory, const Plan& plan) {
  Arrays out;
  Arrays::for_each(out, plan.sizes, std::nullopt, [&](const char*, auto& array, std::int64_t length, bool) {
    array = memory.array<std::decay_t<decltype(array[0])>>(length);
  });
  return out;
}

// Batches of both kinds of some turns, all of trajectories like the example; how many differ from it.
int collate_wrongly(const TrajectoryBuffer& buffer, const Ids& turns, const Ids& owners, int threads) {
  static const Example example;
  archer_fast::testing::Poisoned memory;
  int wrong = 0;
  const auto games = buffer.plan(owners);
  const auto packed = destinations<archer_fast::PackedArrays>(memory, games);
  buffer.collate(games, std::nullopt, threads, packed);
  for (std::size_t t = 0; t < packed.input_ids.size(); ++t) {
    wrong += packed.input_ids[t] != example.tokens[t % example.tokens.size()] ? 1 : 0;
  }
  const auto rows = buffer.plan_transitions(turns);
  const auto transitions = destinations<archer_fast::TransitionArrays>(memory, rows);
  buffer.collate(rows, std::nullopt, threads, transitions);
  for (std::size_t i = 0; i < turns.size(); ++i) {
    wrong += transitions.rewards[i] != example.rewards[static_cast<std::size_t>(turns[i] % 2)] ? 1 : 0;
  }
  return wrong;
}

}  // namespace

TEST_CASE("ids go on counting while whole trajectories leave, oldest first") {
  const Example example;  // 9 tokens, 2 turns
  TrajectoryBuffer by_tokens({20, 100, 0});
  TrajectoryBuffer by_count({1000, 2, 0});
  for (TrajectoryBuffer* const buffer : {&by_tokens, &by_count}) {
    for (std::int64_t id = 0; id < 5; ++id) CHECK(buffer->push(example.view()) == id);
    CHECK(buffer->num_trajectories() == 2);
    CHECK(buffer->num_turns() == 4);
    CHECK(buffer->num_tokens() == 18);
    CHECK(buffer->num_evicted() == 3);
    CHECK(buffer->trajectory_range().first == 3);
    CHECK(buffer->trajectory_range().end == 5);
    CHECK(buffer->turn_range().first == 6);
    CHECK(buffer->turn_range().end == 10);
  }
}

TEST_CASE("a refused push changes nothing") {
  TrajectoryBuffer buffer({8, 4, 0});
  Example example;
  CHECK_THROWS_WITH_AS(buffer.push(example.view()), "tokens: wanted at most max_tokens = 8, got 9",
                       std::invalid_argument);
  example.tokens.pop_back();
  CHECK(buffer.push(example.view()) == 0);
  example.tokens[0] = -1;
  CHECK_THROWS_AS(buffer.push(example.view()), std::invalid_argument);
  CHECK(buffer.num_tokens() == 8);
  CHECK(buffer.num_evicted() == 0);
}

TEST_CASE("a dead id is named with the live range") {
  TrajectoryBuffer buffer({100, 1, 0});
  buffer.push(Example{}.view());
  buffer.push(Example{}.view());
  Ids out(1);
  CHECK_THROWS_WITH_AS(buffer.trajectory_of(Ids{1}, out), "turn_ids[0]: wanted a live id in [2, 4), got 1",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(buffer.plan(Ids{1, 2}), "trajectory_ids[1]: wanted a live id in [1, 2), got 2",
                       std::out_of_range);
  buffer.trajectory_of(Ids{3}, out);
  CHECK(out == Ids{1});
}

TEST_CASE("a batch is refused where a push has evicted one of it since it was planned") {
  const Example example;
  TrajectoryBuffer buffer({1000, 2, 0});
  for (int i = 0; i < 2; ++i) buffer.push(example.view());
  const auto games = buffer.plan(Ids{1, 0});
  const auto turns = buffer.plan_transitions(Ids{3});
  CHECK(turns.sizes.num_tokens == 9);
  CHECK(turns.sizes.num_action_tokens == 2);
  archer_fast::testing::Poisoned memory;
  const auto packed = destinations<archer_fast::PackedArrays>(memory, games);
  const auto transitions = destinations<archer_fast::TransitionArrays>(memory, turns);
  buffer.push(example.view());  // trajectory 0 goes
  CHECK_THROWS_WITH_AS(buffer.collate(games, std::nullopt, 1, packed),
                       "trajectory_ids: wanted live trajectories, got one of 0, which a push has evicted since the "
                       "batch was planned",
                       std::out_of_range);
  buffer.collate(turns, std::nullopt, 1, transitions);  // of trajectory 1
  CHECK(archer_fast::testing::numbers(transitions.input_ids) ==
        archer_fast::testing::Numbers(example.tokens.begin(), example.tokens.end()));
  CHECK(transitions.state_positions[0] == 5);
  buffer.push(example.view());
  CHECK_THROWS_AS(buffer.collate(turns, std::nullopt, 1, transitions), std::out_of_range);
}

TEST_CASE("a restored buffer goes on as the original would have") {
  TrajectoryBuffer buffer({40, 10, 11});
  for (int i = 0; i < 7; ++i) buffer.push(Example{}.view());
  Ids ids(5);
  buffer.sample_turns(ids);
  const auto restored = TrajectoryBuffer::restore(buffer.state());
  for (int i = 0; i < 3; ++i) {
    Ids other(5);
    buffer.sample_turns(ids);
    restored->sample_turns(other);
    CHECK(ids == other);
    CHECK(buffer.push(Example{}.view()) == restored->push(Example{}.view()));
    CHECK(buffer.turn_range().first == restored->turn_range().first);
  }
  const auto wanted = buffer.state(), got = restored->state();
  CHECK(wanted.tokens == got.tokens);
  CHECK(wanted.rollout_logprobs == got.rollout_logprobs);
  CHECK(wanted.policy_versions == got.policy_versions);
}

TEST_CASE("a state that contradicts itself names the field") {
  TrajectoryBuffer buffer({40, 10, 11});
  buffer.push(Example{}.view());
  auto state = buffer.state();
  state.tokens.pop_back();
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state), "tokens: wanted 9 items, got 8", std::invalid_argument);
  state = buffer.state();
  state.options.max_tokens = 5;
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state), "tokens: wanted at most max_tokens = 5, got 9",
                       std::invalid_argument);
  state = buffer.state();
  state.task_ids.push_back(1);
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state), "task_ids: wanted 1 items, got 2", std::invalid_argument);
  state = buffer.state();
  state.priorities.pop_back();
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state), "priorities: wanted 2 items, got 1", std::invalid_argument);
  state = buffer.state();
  state.priorities[1] = 1.5;
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state), "priorities[1]: wanted 0 to max_priority = 1, got 1.5",
                       std::invalid_argument);
  state.max_priority = 0.5;
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state), "max_priority: wanted 1 to 1e+200, got 0.5",
                       std::invalid_argument);
  state = buffer.state();
  state.rewards[0] = 1.0F / 0.0F;
  CHECK_THROWS_WITH_AS(TrajectoryBuffer::restore(state),
                       "trajectory 0 of 1: rewards[0]: wanted a finite number, got inf", std::invalid_argument);
}

TEST_CASE("4 producers, 2 samplers and a saver with eviction racing") {
  TrajectoryBuffer buffer({1000, 50, 0});
  for (int i = 0; i < 8; ++i) buffer.push(Example{}.view());
  std::atomic<bool> stop = false;
  std::atomic<int> wrong = 0, collated = 0;
  std::vector<std::thread> others, producers;
  for (int s = 0; s < 2; ++s) {
    others.emplace_back([&] {
      std::vector<float> weights(8);
      for (int round = 0; !stop; ++round) {
        Ids turns(8), owners(8);
        if (round % 4 == 0) {
          buffer.sample_turns(turns);
        } else if (round % 4 == 1) {
          buffer.sample_turns(turns, {.replacement = false, .min_policy_version = 8, .by_task = true});
        } else {
          buffer.sample_prioritised(0.4, turns, weights);
          buffer.update_priorities(turns, std::vector<double>(8, 0.5 + round % 8));
        }
        try {
          buffer.trajectory_of(turns, owners);
          for (std::size_t i = 0; i < 8; ++i) wrong += owners[i] != turns[i] / 2 ? 1 : 0;  // 2 turns each
          wrong += collate_wrongly(buffer, turns, owners, 1 + round % 2);
          ++collated;
        } catch (const std::out_of_range&) {
          continue;  // evicted since
        }
      }
    });
  }
  others.emplace_back([&] {
    while (!stop) {
      const auto snapshot = buffer.snapshot(0);
      const auto live = static_cast<std::int64_t>(snapshot.num_turns.size());
      wrong += std::ssize(snapshot.since.num_turns) != live || std::ssize(snapshot.priorities) != 2 * live ? 1 : 0;
      wrong += buffer.stats().num_tokens % 9 != 0 ? 1 : 0;
    }
  });
  for (int p = 0; p < 4; ++p) {
    producers.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) buffer.push(Example{}.view());
    });
  }
  for (std::thread& thread : producers) thread.join();
  while (collated < 10) std::this_thread::yield();
  stop = true;
  for (std::thread& thread : others) thread.join();
  CHECK(wrong == 0);
  CHECK(buffer.trajectory_range().end == 8008);
  CHECK(buffer.num_trajectories() == 50);
  CHECK(buffer.priorities().size() == 100);
}

TEST_CASE("a snapshot has the later trajectories, and of all the priorities and numbers of turns") {
  TrajectoryBuffer buffer({1000, 3, 0});
  for (int i = 0; i < 5; ++i) buffer.push(Example{}.view());  // 2, 3 and 4 live
  buffer.update_priorities(Ids{5}, std::vector<double>{7.0});
  const auto snapshot = buffer.snapshot(4);
  CHECK(snapshot.since.first_trajectory_id == 2);
  CHECK(snapshot.since.tokens == Example{}.tokens);
  CHECK(snapshot.since.max_priority == 7.0);
  CHECK(snapshot.priorities == std::vector<double>{1, 7, 1, 1, 1, 1});
  CHECK(snapshot.num_turns == std::vector<std::int64_t>{2, 2, 2});
  CHECK_THROWS_AS(buffer.snapshot(6), std::out_of_range);
  Ids lengths(2);
  buffer.lengths(Ids{4, 2}, lengths);
  CHECK(lengths == Ids{9, 9});
  CHECK_THROWS_AS(buffer.lengths(Ids{4, 1}, lengths), std::out_of_range);
}

TEST_CASE("a writer does not wait for readers that come after it") {
  archer_fast::FairSharedMutex mutex;
  std::atomic<bool> stop = false;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(5);  // a writer who starves gets in then
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!stop && std::chrono::steady_clock::now() < deadline) {
        const archer_fast::ReadLock lock(mutex);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // another one always begins before this one ends
      }
    });
  }
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const archer_fast::WriteLock lock(mutex);
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(1));
  }
  stop = true;
  for (std::thread& thread : readers) thread.join();
}

TEST_CASE("options are checked by name") {
  CHECK_THROWS_WITH_AS(TrajectoryBuffer({1, 1}), "max_tokens: wanted at least 2, got 1", std::invalid_argument);
  CHECK_THROWS_WITH_AS(TrajectoryBuffer({2, 0}), "max_trajectories: wanted at least 1, got 0", std::invalid_argument);
  CHECK_THROWS_WITH_AS(TrajectoryBuffer({2, 1, 0, -1}), "vocab_size: wanted 1 to 2147483648, or 0 for unknown, got -1",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(TrajectoryBuffer({2, 1, 0, 0, 1.5}), "gamma: wanted 0 to 1, got 1.5", std::invalid_argument);
}

TEST_CASE("narrow tokens come back as they went in, and returns are discounted") {
  Example example;
  example.tokens[0] = 65535;
  example.rewards = {-1.0F, -2.0F};
  TrajectoryBuffer narrow({100, 4, 0, 65536, 0.5}), wide({100, 4, 0, 65537, 0.5});
  for (TrajectoryBuffer* const buffer : {&narrow, &wide}) {
    for (int i = 0; i < 3; ++i) buffer->push(example.view());
    const archer_fast::BufferState state = buffer->state();
    CHECK(std::equal(example.tokens.begin(), example.tokens.end(), state.tokens.begin() + 9));
    CHECK(state.rollout_logprobs.size() == 15);
  }
  example.tokens[0] = 65536;
  CHECK_THROWS_AS(narrow.push(example.view()), std::invalid_argument);
  CHECK(wide.push(example.view()) == 3);
  CHECK(narrow.num_trajectories() == 3);
}

TEST_CASE("many trajectories come in at one moment, or none does") {
  TrajectoryBuffer source({100, 4, 0});
  for (int i = 0; i < 3; ++i) source.push(Example{}.view());
  archer_fast::BufferState state = source.state();
  TrajectoryBuffer buffer({20, 4, 0});
  const archer_fast::IdRange ids = buffer.extend(state.columns());
  CHECK(ids.first == 0);
  CHECK(ids.end == 3);
  CHECK(buffer.num_evicted() == 1);
  state.rewards[5] = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH_AS(buffer.extend(state.columns()), "trajectory 2 of 3: rewards[1]: wanted a finite number, got inf",
                       std::invalid_argument);
  state.rewards[5] = 0;
  state.num_turns[0] = 3;
  CHECK_THROWS_WITH_AS(buffer.extend(state.columns()), "observation_lengths: wanted 7 items, got 6",
                       std::invalid_argument);
  CHECK(buffer.trajectory_range().end == 3);
}
