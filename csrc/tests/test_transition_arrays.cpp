#include <doctest/doctest.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "transition_arrays.h"
#include "two_games.h"

using archer_fast::Padding;
using archer_fast::RowLayout;
using archer_fast::TransitionArrays;
using archer_fast::TransitionSizes;
using archer_fast::TransitionView;
using namespace archer_fast::testing;

namespace {

TransitionArrays arrays(Poisoned& memory, const TransitionSizes& sizes, const std::optional<Padding>& padding = {}) {
  const auto [n, num_tokens, num_action_tokens, max_length] = sizes;
  const std::int64_t t = RowLayout::num_places(n, num_tokens, padding);
  return {.input_ids = memory.array<std::int32_t>(t),
          .cu_seqlens = memory.array<std::int32_t>(n + 1),
          .state_positions = memory.array<std::int64_t>(n),
          .action_positions = memory.array<std::int64_t>(n),
          .next_state_positions = memory.array<std::int64_t>(n),
          .turn = memory.array<std::int32_t>(n),
          .rewards = memory.array<float>(n),
          .returns = memory.array<float>(n),
          .policy_versions = memory.array<std::int64_t>(n),
          .is_last = memory.array<bool>(n),
          .terminated = memory.array<bool>(n),
          .truncated = memory.array<bool>(n),
          .rollout_logprobs = memory.array<float>(num_action_tokens),
          .cu_actions = memory.array<std::int32_t>(n + 1),
          .attention_mask = memory.array<bool>(padding ? t : 0),
          .action_mask = memory.array<bool>(padding ? t : 0)};
}

// The second turn of the first game, the only one of the second, the first of the first.
std::vector<TransitionView> three(const TwoGames& games) {
  return {TransitionView::of(games.views[0], 1), TransitionView::of(games.views[1], 0),
          TransitionView::of(games.views[0], 0)};
}

}  // namespace

TEST_CASE("the worked example of transitions") {
  const TwoGames games;
  const auto rows = three(games);
  const TransitionSizes sizes = archer_fast::transition_sizes(rows);
  CHECK(sizes.num_transitions == 3);
  CHECK(sizes.num_tokens == 16);
  CHECK(sizes.num_action_tokens == 6);
  CHECK(sizes.max_length == 8);

  Poisoned memory;
  const TransitionArrays out = arrays(memory, sizes);
  out.check(sizes, std::nullopt);
  archer_fast::collate(rows, std::nullopt, 1, out);
  CHECK(numbers(out.input_ids) == Numbers{17, 9, 41, 2, 12, 5, 2, 30, 17, 8, 2, 17, 9, 41, 2, 12});
  CHECK(numbers(out.cu_seqlens) == Numbers{0, 8, 11, 16});
  CHECK(numbers(out.state_positions) == Numbers{4, 8, 12});
  CHECK(numbers(out.action_positions) == Numbers{6, 10, 14});
  CHECK(numbers(out.next_state_positions) == Numbers{7, 10, 15});
  CHECK(numbers(out.turn) == Numbers{1, 0, 0});
  CHECK(numbers(out.rewards) == Numbers{0, -1, -1});
  CHECK(numbers(out.returns) == Numbers{-0.5, -1, -1.5});
  CHECK(numbers(out.policy_versions) == Numbers{7, 7, 7});
  CHECK(numbers(out.is_last) == Numbers{1, 1, 0});
  CHECK(numbers(out.terminated) == Numbers{1, 0, 0});
  CHECK(numbers(out.truncated) == Numbers{0, 1, 0});
  CHECK(numbers(out.rollout_logprobs) == Numbers{-3, -4, -5, -6, -1, -2});
  CHECK(numbers(out.cu_actions) == Numbers{0, 2, 4, 6});
}

TEST_CASE("the worked example of transitions, padded on either side") {
  const TwoGames games;
  const auto rows = three(games);
  const TransitionSizes sizes = archer_fast::transition_sizes(rows);
  const std::optional left = Padding{.width = 8, .pad_token_id = 1, .is_left = true};
  Poisoned memory;
  const TransitionArrays out = arrays(memory, sizes, left);
  out.check(sizes, left);
  archer_fast::collate(rows, left, 1, out);
  CHECK(numbers(out.input_ids) ==
        Numbers{17, 9, 41, 2, 12, 5, 2, 30, 1, 1, 1, 1, 1, 17, 8, 2, 1, 1, 1, 17, 9, 41, 2, 12});
  CHECK(numbers(out.attention_mask) == Numbers{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1});
  CHECK(numbers(out.action_mask) == Numbers{0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0});
  CHECK(numbers(out.state_positions) == Numbers{4, 13, 20});
  CHECK(numbers(out.next_state_positions) == Numbers{7, 15, 23});
  CHECK(numbers(out.rollout_logprobs) == Numbers{-3, -4, -5, -6, -1, -2});

  const std::optional right = Padding{.width = 8, .pad_token_id = 1, .is_left = false};
  const TransitionArrays other = arrays(memory, sizes, right);
  archer_fast::collate(rows, right, 1, other);
  CHECK(numbers(other.input_ids) ==
        Numbers{17, 9, 41, 2, 12, 5, 2, 30, 17, 8, 2, 1, 1, 1, 1, 1, 17, 9, 41, 2, 12, 1, 1, 1});
  CHECK(numbers(other.state_positions) == Numbers{4, 8, 17});
}

TEST_CASE("a destination of transitions of the wrong length is named") {
  const TwoGames games;
  const TransitionSizes sizes = archer_fast::transition_sizes(three(games));
  Poisoned memory;
  TransitionArrays out = arrays(memory, sizes);
  out.rollout_logprobs = out.rollout_logprobs.first(5);
  CHECK_THROWS_WITH_AS(out.check(sizes, std::nullopt), "rollout_logprobs: wanted length 6, got 5",
                       std::invalid_argument);
}

TEST_CASE("no transitions are two zeros") {
  Poisoned memory;
  const TransitionArrays out = arrays(memory, {});
  out.check(archer_fast::transition_sizes({}), std::nullopt);
  archer_fast::collate(std::span<const TransitionView>{}, std::nullopt, 4, out);
  CHECK(numbers(out.cu_seqlens) == Numbers{0});
  CHECK(numbers(out.cu_actions) == Numbers{0});
}
