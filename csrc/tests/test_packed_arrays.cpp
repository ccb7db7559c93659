#include <doctest/doctest.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "packed_arrays.h"

using archer_fast::PackedArrays;
using archer_fast::PackedSizes;
using archer_fast::TokenSpan;
using archer_fast::TrajectoryView;
using archer_fast::TurnRecord;

namespace {

// The two games of archer_fast/packing.py.
struct TwoGames {
  std::vector<TurnRecord> first_turns{{7, 2, 4, -1.0F, -1.5F}, {7, 5, 7, 0.0F, -0.5F}};
  std::vector<std::int32_t> first_tokens{17, 9, 41, 2, 12, 5, 2, 30};
  std::vector<float> first_logprobs{-1, -2, -3, -4};
  std::vector<TurnRecord> second_turns{{7, 1, 3, -1.0F, -1.0F}};
  std::vector<std::int32_t> second_tokens{17, 8, 2};
  std::vector<float> second_logprobs{-5, -6};
  std::vector<TrajectoryView> views{{first_turns, wide(first_tokens), first_logprobs, true},
                                    {second_turns, wide(second_tokens), second_logprobs, false}};

  static TokenSpan wide(const std::vector<std::int32_t>& tokens) {
    return {reinterpret_cast<const std::byte*>(tokens.data()), std::ssize(tokens), false};
  }
};

// Poisoned, so that an element nobody wrote is seen.
struct Storage {
  explicit Storage(PackedSizes sizes)
      : sizes(sizes),
        ints(5, std::vector<std::int32_t>(size(sizes.num_tokens + sizes.num_turns + 2), -99)),
        longs(4, std::vector<std::int64_t>(size(sizes.num_turns + sizes.num_trajectories), -99)),
        cu_turns(size(sizes.num_trajectories + 1), -99),
        rewards(size(sizes.num_turns), -99),
        returns(size(sizes.num_turns), -99),
        scores(size(sizes.num_tokens), -99),
        bools(new bool[size(sizes.num_tokens + 2 * sizes.num_trajectories)]) {}

  PackedArrays spans() {
    const std::size_t b = size(sizes.num_trajectories), n = size(sizes.num_turns), t = size(sizes.num_tokens);
    return {.input_ids = {ints[0].data(), t},
            .position_ids = {ints[1].data(), t},
            .cu_seqlens = {ints[2].data(), b + 1},
            .turn_ids = {ints[3].data(), t},
            .action_mask = {bools.get(), t},
            .cu_turns = cu_turns,
            .state_positions = {longs[0].data(), n},
            .action_positions = {longs[1].data(), n},
            .final_positions = {longs[2].data(), b},
            .turn = {ints[4].data(), n},
            .rewards = rewards,
            .returns = returns,
            .policy_versions = {longs[3].data(), n},
            .terminated = {bools.get() + t, b},
            .truncated = {bools.get() + t + b, b},
            .rollout_logprobs = scores};
  }

  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  PackedSizes sizes;
  std::vector<std::vector<std::int32_t>> ints;
  std::vector<std::vector<std::int64_t>> longs;
  std::vector<std::int32_t> cu_turns;
  std::vector<float> rewards;
  std::vector<float> returns;
  std::vector<float> scores;
  std::unique_ptr<bool[]> bools;
};

template <class T>
std::vector<double> numbers(std::span<T> values) {
  return {values.begin(), values.end()};
}

using Numbers = std::vector<double>;

}  // namespace

TEST_CASE("the worked example") {
  const TwoGames games;
  const PackedSizes sizes = archer_fast::packed_sizes(games.views);
  CHECK(sizes.num_trajectories == 2);
  CHECK(sizes.num_turns == 3);
  CHECK(sizes.num_tokens == 11);

  Storage storage(sizes);
  const PackedArrays out = storage.spans();
  out.check(sizes);
  archer_fast::collate(games.views, out);
  CHECK(numbers(out.input_ids) == Numbers{17, 9, 41, 2, 12, 5, 2, 30, 17, 8, 2});
  CHECK(numbers(out.position_ids) == Numbers{0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2});
  CHECK(numbers(out.cu_seqlens) == Numbers{0, 8, 11});
  CHECK(numbers(out.turn_ids) == Numbers{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2});
  CHECK(numbers(out.action_mask) == Numbers{0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1});
  CHECK(numbers(out.cu_turns) == Numbers{0, 2, 3});
  CHECK(numbers(out.state_positions) == Numbers{1, 4, 8});
  CHECK(numbers(out.action_positions) == Numbers{3, 6, 10});
  CHECK(numbers(out.final_positions) == Numbers{7, 10});
  CHECK(numbers(out.turn) == Numbers{0, 1, 0});
  CHECK(numbers(out.rewards) == Numbers{-1, 0, -1});
  CHECK(numbers(out.returns) == Numbers{-1.5, -0.5, -1});
  CHECK(numbers(out.policy_versions) == Numbers{7, 7, 7});
  CHECK(numbers(out.terminated) == Numbers{1, 0});
  CHECK(numbers(out.truncated) == Numbers{0, 1});
  CHECK(numbers(out.rollout_logprobs) == Numbers{0, 0, -1, -2, 0, -3, -4, 0, 0, -5, -6});
}

TEST_CASE("an array of the wrong length is named") {
  const TwoGames games;
  const PackedSizes sizes = archer_fast::packed_sizes(games.views);
  Storage storage(sizes);
  PackedArrays out = storage.spans();
  out.cu_turns = out.cu_turns.first(2);
  CHECK_THROWS_WITH_AS(out.check(sizes), "cu_turns: wanted length 3, got 2", std::invalid_argument);
}

TEST_CASE("an empty batch is two zeros") {
  Storage storage(PackedSizes{});
  const PackedArrays out = storage.spans();
  out.check(archer_fast::packed_sizes({}));
  archer_fast::collate({}, out);
  CHECK(numbers(out.cu_seqlens) == Numbers{0});
  CHECK(numbers(out.cu_turns) == Numbers{0});
}
