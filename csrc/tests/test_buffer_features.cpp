#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "example.h"
#include "trajectory_buffer.h"

namespace {

using archer_fast::BufferOptions;
using archer_fast::FeatureMemory;
using archer_fast::FeatureStore;
using archer_fast::TrajectoryBuffer;
using archer_fast::testing::Example;
using Bytes = std::vector<std::byte>;
using Ids = std::vector<std::int64_t>;

// A row is (trajectory, row of it, trunk version, which rows were set), so that a torn or mixed one shows.
constexpr std::int64_t kRowBytes = 4 * sizeof(std::int64_t);
constexpr std::int64_t kNumRows = 3;  // of the example's two turns

BufferOptions options(std::int64_t max_trajectories) {
  return {.max_tokens = 1 << 20, .max_trajectories = max_trajectories, .feature_bytes = kRowBytes};
}

FeatureMemory memory(std::int64_t max_feature_memory) {
  return {.max_feature_memory = max_feature_memory, .feature_folder = std::filesystem::temp_directory_path().string()};
}

Bytes rows_of(std::int64_t trajectory_id, std::int64_t trunk_version, std::int64_t mark) {
  Bytes rows(static_cast<std::size_t>(kNumRows * kRowBytes));
  for (std::int64_t i = 0; i < kNumRows; ++i) {
    const std::int64_t row[] = {trajectory_id, i, trunk_version, mark};
    std::memcpy(rows.data() + i * kRowBytes, row, sizeof(row));
  }
  return rows;
}

std::vector<std::int64_t> numbers(const Bytes& rows) {
  std::vector<std::int64_t> values(rows.size() / sizeof(std::int64_t));
  std::memcpy(values.data(), rows.data(), rows.size());
  return values;
}

}  // namespace

TEST_CASE("a turn is read with the row behind it, whatever was evicted, and the last turn with the final row") {
  TrajectoryBuffer buffer(options(4), memory(0));
  for (int i = 0; i < 6; ++i) buffer.push(Example{}.view());  // 2 to 5 live, of turns 4 to 11
  for (std::int64_t id = 2; id < 6; ++id) buffer.set_features(Ids{id}, 7, rows_of(id, 7, 0));
  CHECK(buffer.stats().num_mapped_bytes > 0);
  Bytes rows(3 * kRowBytes), next(3 * 16);
  buffer.read_features(Ids{11, 4, 8}, 7, rows, next, 1);
  CHECK(numbers(rows) == Ids{5, 1, 7, 0, 2, 0, 7, 0, 4, 0, 7, 0});
  CHECK(numbers(next) == Ids{5, 2, 2, 1, 4, 1});
  buffer.read_features(Ids{}, 7, {}, {}, 1);
}

TEST_CASE("what is wrong is named and nothing is written") {
  TrajectoryBuffer buffer(options(4));
  for (int i = 0; i < 3; ++i) buffer.push(Example{}.view());
  buffer.set_features(Ids{0}, 7, rows_of(0, 7, 0));
  Bytes two = rows_of(0, 8, 0), row(kRowBytes), next(8), wide(33);
  CHECK_THROWS_WITH_AS(buffer.set_features(Ids{0, 1}, 8, two), "rows: wanted 6 rows of 32 bytes, got 96 bytes in all",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(buffer.set_features(Ids{0}, -1, two), "trunk_version: wanted 0 or more, got -1",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(buffer.set_features(Ids{3}, 8, two), "trajectory_ids[0]: wanted a live id in [0, 3), got 3",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(
      buffer.read_features(Ids{0}, 8, row, next, 1),
      "turn_ids[0]: wanted features of trunk version 8, got turn 0 of trajectory 0, which has version 7",
      std::invalid_argument);
  CHECK_THROWS_WITH_AS(buffer.read_features(Ids{3}, 7, row, next, 1),
                       "turn_ids[0]: wanted features of trunk version 7, got turn 3 of trajectory 1, which has none",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(buffer.read_features(Ids{0, 1}, 7, row, next, 1),
                       "rows: wanted 2 rows of 32 bytes, got 32 bytes in all", std::invalid_argument);
  CHECK_THROWS_WITH_AS(buffer.read_features(Ids{0}, 7, row, wide, 1),
                       "next_rows: wanted 1 rows of 0 to 32 bytes, got 33 bytes in all", std::invalid_argument);
  CHECK(numbers(row) == Ids{0, 0, 0, 0});
  CHECK(buffer.trajectories_without_features(7) == Ids{1, 2});
  CHECK(buffer.trajectories_without_features(8) == Ids{0, 1, 2});

  TrajectoryBuffer none({.max_tokens = 100, .max_trajectories = 2});
  none.push(Example{}.view());
  CHECK_THROWS_WITH_AS(none.set_features(Ids{0}, 1, two),
                       "features: wanted a buffer with some, got one of feature_bytes = 0", std::invalid_argument);
  CHECK_THROWS_AS(none.trajectories_without_features(0), std::invalid_argument);
  CHECK(none.features_stamp() == 0);
  CHECK_THROWS_WITH_AS(TrajectoryBuffer({.max_tokens = 100, .max_trajectories = 2, .feature_bytes = -1}),
                       "feature_bytes: wanted 0 to 1073741824, got -1", std::invalid_argument);
  CHECK_THROWS_WITH_AS(TrajectoryBuffer(options(2), memory(-1)), "max_feature_memory: wanted at least 0, got -1",
                       std::invalid_argument);
}

TEST_CASE("a push whose features find no room leaves nothing") {
  Example large;
  const std::size_t num_turns = FeatureStore::kDefaultChunkBytes / kRowBytes;
  large.observation_lengths.assign(num_turns, 1);
  large.action_lengths.assign(num_turns, 1);
  large.tokens.assign(2 * num_turns, 3);
  large.rollout_logprobs.assign(num_turns, -1.0F);
  large.rewards.assign(num_turns, 0.0F);
  large.policy_versions.assign(num_turns, 9);
  TrajectoryBuffer buffer({.max_tokens = 1 << 22, .max_trajectories = 4, .feature_bytes = kRowBytes},
                          {.max_feature_memory = FeatureStore::kDefaultChunkBytes, .feature_folder = "/no"});
  buffer.push(Example{}.view());
  buffer.set_features(Ids{0}, 7, rows_of(0, 7, 5));
  const auto before = buffer.stats();
  CHECK_THROWS_AS(buffer.push(large.view()), std::system_error);
  const auto after = buffer.stats();
  CHECK(after.num_turns == 2);
  CHECK(after.num_tokens == before.num_tokens);
  CHECK(after.num_bytes == before.num_bytes);
  CHECK(after.turns_by_version == before.turns_by_version);
  CHECK(buffer.turn_range().end == 2);
  CHECK(buffer.push(Example{}.view()) == 1);
  Bytes row(kRowBytes);
  buffer.read_features(Ids{1}, 7, row, {}, 1);
  CHECK(numbers(row) == Ids{0, 1, 7, 5});
}

TEST_CASE("a writer copies whole trajectories, and learns what was set since") {
  TrajectoryBuffer buffer(options(3));
  for (int i = 0; i < 5; ++i) buffer.push(Example{}.view());  // 2, 3, 4 live
  CHECK(buffer.features_stamp() == 0);
  buffer.set_features(Ids{2, 4}, 7, [] {
    Bytes both = rows_of(2, 7, 0), other = rows_of(4, 7, 0);
    both.insert(both.end(), other.begin(), other.end());
    return both;
  }());
  const std::uint64_t before = buffer.features_stamp();
  CHECK(buffer.features_stamp({0, 5}) == before);
  CHECK(buffer.features_stamp({0, 4}) < before);
  CHECK(buffer.features_stamp({3, 4}) == 0);
  CHECK(buffer.features_stamp({9, 20}) == 0);
  buffer.set_features(Ids{3}, 9, rows_of(3, 9, 0));
  CHECK(buffer.features_stamp({3, 4}) > before);
  CHECK(buffer.features_stamp({4, 5}) <= before);

  Ids versions(4, 55);
  Bytes rows(4 * kNumRows * kRowBytes, std::byte{9});
  buffer.copy_features(1, Ids{2, 2, 2, 2}, versions, rows);
  CHECK(versions == Ids{-1, 7, 9, 7});  // the first was evicted
  Bytes wanted(kNumRows * kRowBytes);
  for (const auto& [id, version] : {std::pair{2, 7}, std::pair{3, 9}, std::pair{4, 7}}) {
    const Bytes more = rows_of(id, version, 0);
    wanted.insert(wanted.end(), more.begin(), more.end());
  }
  CHECK(rows == wanted);
  constexpr std::int64_t kLast = std::numeric_limits<std::int64_t>::max();
  buffer.copy_features(kLast, Ids{1, 1}, std::span(versions).first(2), std::span(rows).first(4 * kRowBytes));
  CHECK(versions[1] == FeatureStore::kNoVersion);
  CHECK_THROWS_WITH_AS(buffer.copy_features(3, Ids{3}, std::span(versions).first(1), std::span(rows).first(128)),
                       "num_turns[0]: wanted 2 of trajectory 3, got 3", std::invalid_argument);
  CHECK_THROWS_AS(buffer.copy_features(3, Ids{0}, std::span(versions).first(1), std::span(rows).first(32)),
                  std::invalid_argument);
}

TEST_CASE("a restored buffer has room for features, and none") {
  TrajectoryBuffer buffer(options(4));
  for (int i = 0; i < 3; ++i) buffer.push(Example{}.view());
  buffer.set_features(Ids{1}, 7, rows_of(1, 7, 0));
  const auto again = TrajectoryBuffer::restore(buffer.state(), memory(0));
  CHECK(again->options().feature_bytes == kRowBytes);
  CHECK(again->trajectories_without_features(7) == Ids{0, 1, 2});
  again->set_features(Ids{2}, 8, rows_of(2, 8, 0));
  CHECK(again->trajectories_without_features(8) == Ids{0, 1});
  CHECK(again->stats().num_mapped_bytes > 0);
}

TEST_CASE("two that push and set, two that read, and eviction: no row is torn, mixed or another's") {
  TrajectoryBuffer buffer(options(40), memory(0));
  constexpr int kReads = 300;  // of each reader; the writers go on until they are done
  std::atomic<int> num_reading = 2;
  std::atomic<bool> is_wrong = false;
  const auto write = [&](std::int64_t trunk_version) {
    for (int i = 0; num_reading > 0; ++i) {
      const std::int64_t id = buffer.push(Example{}.view());
      try {
        buffer.set_features(Ids{id}, trunk_version, rows_of(id, trunk_version, i));
        const std::int64_t older = std::max<std::int64_t>(id - 20, 0);
        buffer.set_features(Ids{older}, trunk_version, rows_of(older, trunk_version, i));
      } catch (const std::out_of_range&) {  // the other evicted it
      }
    }
  };
  const auto read = [&](std::int64_t trunk_version, int threads) {
    std::mt19937 rng(static_cast<unsigned>(trunk_version));
    Bytes rows(8 * kRowBytes), next(8 * kRowBytes);
    for (int num_read = 0; num_read < kReads;) {
      const auto live = buffer.turn_range();
      if (live.size() == 0) continue;
      Ids turn_ids(8, live.first + static_cast<std::int64_t>(rng() % static_cast<unsigned>(live.size())));
      try {
        buffer.read_features(turn_ids, trunk_version, rows, next, threads);
      } catch (const std::out_of_range&) {
        continue;
      } catch (const std::invalid_argument&) {
        continue;
      }
      const Ids got = numbers(rows), behind = numbers(next);
      for (std::size_t i = 0; i < 8; ++i) {
        const std::int64_t id = turn_ids[i] / 2, row = turn_ids[i] % 2, mark = got[4 * i + 3];
        const Ids wanted{id, row, trunk_version, mark}, wanted_behind{id, row + 1, trunk_version, mark};
        if (!std::equal(wanted.begin(), wanted.end(), got.begin() + static_cast<std::ptrdiff_t>(4 * i)) ||
            !std::equal(wanted_behind.begin(), wanted_behind.end(),
                        behind.begin() + static_cast<std::ptrdiff_t>(4 * i))) {
          is_wrong = true;
        }
      }
      ++num_read;
    }
    --num_reading;
  };
  std::vector<std::thread> threads;
  threads.emplace_back(write, 1);
  threads.emplace_back(write, 2);
  threads.emplace_back(read, 1, 1);
  threads.emplace_back(read, 2, 2);
  for (std::thread& thread : threads) thread.join();
  CHECK_FALSE(is_wrong);
}
