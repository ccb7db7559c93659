#include <doctest/doctest.h>

#include <optional>
#include <stdexcept>

#include "packed_arrays.h"
#include "parallel_ranges.h"
#include "two_games.h"

using archer_fast::PackedArrays;
using archer_fast::PackedSizes;
using archer_fast::Padding;
using archer_fast::RowLayout;
using archer_fast::TrajectoryView;
using namespace archer_fast::testing;

namespace {

PackedArrays arrays(Poisoned& memory, const PackedSizes& sizes, const std::optional<Padding>& padding = std::nullopt) {
  const auto [b, n, num_tokens, max_length] = sizes;
  const std::int64_t t = RowLayout::num_places(b, num_tokens, padding);
  return {.input_ids = memory.array<std::int32_t>(t),
          .position_ids = memory.array<std::int32_t>(t),
          .cu_seqlens = memory.array<std::int32_t>(b + 1),
          .turn_ids = memory.array<std::int32_t>(t),
          .action_mask = memory.array<bool>(t),
          .cu_turns = memory.array<std::int32_t>(b + 1),
          .state_positions = memory.array<std::int64_t>(n),
          .action_positions = memory.array<std::int64_t>(n),
          .final_positions = memory.array<std::int64_t>(b),
          .turn = memory.array<std::int32_t>(n),
          .rewards = memory.array<float>(n),
          .returns = memory.array<float>(n),
          .policy_versions = memory.array<std::int64_t>(n),
          .terminated = memory.array<bool>(b),
          .truncated = memory.array<bool>(b),
          .rollout_logprobs = memory.array<float>(t),
          .attention_mask = memory.array<bool>(padding ? t : 0)};
}

}  // namespace

TEST_CASE("the worked example of packed arrays") {
  const TwoGames games;
  const PackedSizes sizes = archer_fast::packed_sizes(games.views);
  CHECK(sizes.num_trajectories == 2);
  CHECK(sizes.num_turns == 3);
  CHECK(sizes.num_tokens == 11);
  CHECK(sizes.max_length == 8);

  Poisoned memory;
  const PackedArrays out = arrays(memory, sizes);
  out.check(sizes, std::nullopt);
  archer_fast::collate(games.views, std::nullopt, 1, out);
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

TEST_CASE("the worked example of packed arrays, padded on the left") {
  const TwoGames games;
  const PackedSizes sizes = archer_fast::packed_sizes(games.views);
  const std::optional padding = Padding{.width = 9, .pad_token_id = 4, .is_left = true};
  Poisoned memory;
  const PackedArrays out = arrays(memory, sizes, padding);
  out.check(sizes, padding);
  archer_fast::collate(games.views, padding, 1, out);
  CHECK(numbers(out.input_ids) == Numbers{4, 17, 9, 41, 2, 12, 5, 2, 30, 4, 4, 4, 4, 4, 4, 17, 8, 2});
  CHECK(numbers(out.attention_mask) == Numbers{0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1});
  CHECK(numbers(out.position_ids) == Numbers{0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 1, 2});
  CHECK(numbers(out.turn_ids) == Numbers{-1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, 2, 2, 2});
  CHECK(numbers(out.action_mask) == Numbers{0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1});
  CHECK(numbers(out.rollout_logprobs) == Numbers{0, 0, 0, -1, -2, 0, -3, -4, 0, 0, 0, 0, 0, 0, 0, 0, -5, -6});
  CHECK(numbers(out.cu_seqlens) == Numbers{0, 8, 11});
  CHECK(numbers(out.state_positions) == Numbers{2, 5, 15});
  CHECK(numbers(out.action_positions) == Numbers{4, 7, 17});
  CHECK(numbers(out.final_positions) == Numbers{8, 17});
}

TEST_CASE("several threads write what one does") {
  const TwoGames games;
  std::vector<TrajectoryView> many;
  for (int i = 0; i < 60'000; ++i) many.push_back(games.views[static_cast<std::size_t>(i % 7 == 0)]);
  const PackedSizes sizes = archer_fast::packed_sizes(many);
  for (const auto& padding : {std::optional<Padding>{}, std::optional(Padding{9, 4, true})}) {
    CHECK(archer_fast::threads_worth(17 * RowLayout::num_places(60'000, sizes.num_tokens, padding), 3) == 3);
    Poisoned memory;
    const PackedArrays one = arrays(memory, sizes, padding), three = arrays(memory, sizes, padding);
    archer_fast::collate(many, padding, 1, one);
    archer_fast::collate(many, padding, 3, three);
    std::vector<Numbers> wanted;
    PackedArrays::for_each(one, sizes, padding, [&](const char*, const auto& array, std::int64_t, bool) {
      wanted.push_back(numbers(array));
    });
    std::size_t next = 0;
    PackedArrays::for_each(three, sizes, padding, [&](const char* name, const auto& array, std::int64_t, bool) {
      CHECK_MESSAGE(numbers(array) == wanted[next++], name);
    });
    CHECK(next == (padding ? 17 : 16));
  }
}

TEST_CASE("an array of the wrong length is named") {
  const TwoGames games;
  const PackedSizes sizes = archer_fast::packed_sizes(games.views);
  Poisoned memory;
  PackedArrays out = arrays(memory, sizes);
  out.cu_turns = out.cu_turns.first(2);
  CHECK_THROWS_WITH_AS(out.check(sizes, std::nullopt), "cu_turns: wanted length 3, got 2", std::invalid_argument);
  const Padding padding{.width = 8, .pad_token_id = 0, .is_left = false};
  CHECK_THROWS_WITH_AS(arrays(memory, sizes).check(sizes, padding), "input_ids: wanted length 16, got 11",
                       std::invalid_argument);
  out = arrays(memory, sizes, padding);
  out.attention_mask = out.attention_mask.first(15);
  CHECK_THROWS_WITH_AS(out.check(sizes, padding), "attention_mask: wanted length 16, got 15", std::invalid_argument);
}

TEST_CASE("an empty batch is two zeros") {
  Poisoned memory;
  const std::optional<Padding> none, wide = Padding{.width = 5, .pad_token_id = 0, .is_left = true};
  for (const auto& padding : {none, wide}) {
    const PackedArrays out = arrays(memory, PackedSizes{}, padding);
    out.check(archer_fast::packed_sizes({}), padding);
    archer_fast::collate(std::span<const TrajectoryView>{}, padding, 1, out);
    CHECK(numbers(out.cu_seqlens) == Numbers{0});
    CHECK(numbers(out.cu_turns) == Numbers{0});
  }
}
