#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <vector>

#include "counter_rng.h"
#include "token_packer.h"

using archer_fast::CounterRng;
using archer_fast::pack_tokens;
using archer_fast::TokenPlan;
using Numbers = std::vector<std::int64_t>;

namespace {

template <class T>
T& at(std::vector<T>& values, std::int64_t index) {
  return values.at(static_cast<std::size_t>(index));
}

std::vector<Numbers> bins_of(const TokenPlan& plan) {
  std::vector<Numbers> bins;
  for (std::size_t bin = 0; bin + 1 < plan.cu_bins.size(); ++bin) {
    bins.emplace_back(plan.item_ids.begin() + plan.cu_bins[bin], plan.item_ids.begin() + plan.cu_bins[bin + 1]);
  }
  return bins;
}

double cost_of(const Numbers& bin, Numbers& lengths) {
  double cost = 0;
  for (const std::int64_t id : bin) cost += static_cast<double>(at(lengths, id)) * static_cast<double>(at(lengths, id));
  return cost;
}

// What every plan promises; the bins.
std::vector<Numbers> checked(Numbers lengths, std::int64_t max_tokens, std::int64_t num_ranks = 1) {
  const TokenPlan plan = pack_tokens(lengths, max_tokens, num_ranks);
  REQUIRE(plan.cu_bins.front() == 0);
  REQUIRE(plan.cu_bins.back() == static_cast<std::int64_t>(lengths.size()));
  std::vector<Numbers> bins = bins_of(plan);
  CHECK(bins.size() % static_cast<std::size_t>(num_ranks) == 0);
  Numbers seen(lengths.size(), 0);
  const std::size_t each = bins.size() / static_cast<std::size_t>(num_ranks);
  for (std::size_t place = 0; place < bins.size(); ++place) {
    const Numbers& bin = bins[place];
    CHECK(!bin.empty());
    CHECK(std::is_sorted(bin.begin(), bin.end()));
    std::int64_t tokens = 0;
    for (const std::int64_t id : bin) {
      tokens += at(lengths, id);
      ++at(seen, id);
    }
    CHECK(tokens <= max_tokens);
    if (place % each != 0) {
      const double before = cost_of(bins[place - 1], lengths), here = cost_of(bin, lengths);
      CHECK((before > here || (before == here && bins[place - 1].front() < bin.front())));
    }
  }
  CHECK(seen == Numbers(lengths.size(), 1));
  return bins;
}

// Games of 20 turns of about 20 tokens, or where `ragged` of 1 to 20 turns.
Numbers game_lengths(std::size_t n, bool ragged) {
  CounterRng rng(5);
  Numbers lengths(n);
  for (std::int64_t& length : lengths) {
    const std::uint64_t turns = ragged ? 1 + rng.below(20) : 20;
    for (std::uint64_t turn = 0; turn < turns; ++turn) length += static_cast<std::int64_t>(8 + rng.below(25));
  }
  return lengths;
}

double max_over_mean(const std::vector<Numbers>& bins, Numbers& lengths) {
  double most = 0, total = 0;
  for (const Numbers& bin : bins) {
    most = std::max(most, cost_of(bin, lengths));
    total += cost_of(bin, lengths);
  }
  return most * static_cast<double>(bins.size()) / total;
}

std::size_t first_fit_decreasing(Numbers lengths, std::int64_t max_tokens) {
  std::sort(lengths.rbegin(), lengths.rend());
  Numbers rooms;
  for (const std::int64_t length : lengths) {
    const auto place = std::find_if(rooms.begin(), rooms.end(), [=](std::int64_t room) { return room >= length; });
    if (place == rooms.end()) {
      rooms.push_back(max_tokens - length);
    } else {
      *place -= length;
    }
  }
  return rooms.size();
}

}  // namespace

TEST_CASE("the worked example of token_packer.py: the shortest are placed by fit where cost alone overflows") {
  CHECK(checked({5, 2, 3, 4, 2}, 8) == std::vector<Numbers>{{0, 2}, {1, 3, 4}});
}

TEST_CASE("where there is room, each goes to the cheapest bin, of equals to the first") {
  // 6 -> a, 6 -> b, 4 -> a (52), 4 -> b (52), 1 -> a (53), 1 -> b (53); two bins of 12 need nothing moved.
  CHECK(checked({1, 6, 4, 6, 4, 1}, 12) == std::vector<Numbers>{{0, 1, 2}, {3, 4, 5}});
}

TEST_CASE("a bin that was too full for one item opens again for a shorter one") {
  // 7 -> a, 5 -> b, 4 -> b (41); 3 fits a alone (58); 1 -> b, which is cheaper.
  CHECK(checked({7, 5, 4, 3, 1}, 11) == std::vector<Numbers>{{0, 3}, {1, 2, 4}});
}

TEST_CASE("an item as long as a bin has it to itself; a longer one is refused by index") {
  CHECK(checked({8, 3, 8}, 8) == std::vector<Numbers>{{0}, {2}, {1}});
  CHECK(checked({7}, 7) == std::vector<Numbers>{{0}});
  CHECK_THROWS_WITH_AS(pack_tokens(Numbers{8, 3, 9, 11}, 8), "lengths[2]: wanted 1 to max_tokens 8, got 9",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(pack_tokens(Numbers{8, 0}, 8), "lengths[1]: wanted 1 to max_tokens 8, got 0",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(pack_tokens(Numbers{-3}, 8), "lengths[0]: wanted 1 to max_tokens 8, got -3",
                       std::invalid_argument);
}

TEST_CASE("bounds of the other arguments") {
  CHECK_THROWS_WITH_AS(pack_tokens(Numbers{1}, 0), "max_tokens: wanted 1 to 2147483647, got 0", std::invalid_argument);
  CHECK_THROWS_AS(pack_tokens(Numbers{1}, std::int64_t{1} << 31), std::invalid_argument);
  CHECK_THROWS_WITH_AS(pack_tokens(Numbers{1}, 8, 0), "num_ranks: wanted 1 or more, got 0", std::invalid_argument);
}

TEST_CASE("no lengths, no bins, on however many ranks") {
  CHECK(pack_tokens({}, 8, 3).item_ids.empty());
  CHECK(pack_tokens({}, 8, 3).cu_bins == Numbers{0});
}

TEST_CASE("the longest lengths there can be keep their squares apart") {
  const std::int64_t most = std::numeric_limits<std::int32_t>::max();
  CHECK(checked({most - 1, most, 1, most, most, most}, most) == std::vector<Numbers>{{1}, {3}, {4}, {5}, {0, 2}});
  CHECK(checked({most, most - 1, most, most - 2}, most, 2) == std::vector<Numbers>{{0}, {1}, {2}, {3}});
}

TEST_CASE("plans keep their promises whatever the lengths, with never more bins than first-fit decreasing") {
  CounterRng rng(1);
  for (int round = 0; round < 3000; ++round) {
    const auto max_tokens = static_cast<std::int64_t>(1 + rng.below(60));
    const std::uint64_t longest = 1 + rng.below(static_cast<std::uint64_t>(max_tokens));
    Numbers lengths(1 + rng.below(70));
    for (std::int64_t& length : lengths) length = static_cast<std::int64_t>(1 + rng.below(longest));
    const auto bins = checked(lengths, max_tokens);
    CHECK(bins.size() <= first_fit_decreasing(lengths, max_tokens));
  }
}

TEST_CASE("ranks get as many bins each, none empty, and near equal costs") {
  Numbers lengths = game_lengths(1000, true);
  for (const std::int64_t num_ranks : {2, 3, 7, 16}) {
    const auto bins = checked(lengths, 5000, num_ranks);
    std::vector<double> ranks(static_cast<std::size_t>(num_ranks), 0.0);
    for (std::size_t i = 0; i < bins.size(); ++i) {
      ranks[i * static_cast<std::size_t>(num_ranks) / bins.size()] += cost_of(bins[i], lengths);
    }
    double most = 0, total = 0;
    for (const double cost : ranks) {
      most = std::max(most, cost);
      total += cost;
    }
    CHECK(most * static_cast<double>(num_ranks) / total < 1.02);
  }
}

TEST_CASE("rounding up to the ranks may split what would have shared a bin, never what is alone") {
  CHECK(checked({3, 1, 2}, 10, 3) == std::vector<Numbers>{{0}, {2}, {1}});
  CHECK(checked({4, 4, 4, 4, 4}, 8, 5).size() == 5);
  CHECK_THROWS_WITH_AS(pack_tokens(Numbers{3, 1}, 10, 3),
                       "num_ranks: wanted at least one length a bin, got 2 lengths, which need 1 bins or more, on 3 "
                       "ranks",
                       std::invalid_argument);
  CHECK_THROWS_AS(pack_tokens(Numbers{9, 9, 9}, 10, 2), std::invalid_argument);  // 3 bins, wanted 4
}

TEST_CASE("16,384 games fill their bins and cost the same") {
  Numbers games = game_lengths(16'384, false), ragged = game_lengths(16'384, true);
  const auto efficiency = [](Numbers& lengths, const std::vector<Numbers>& bins, std::int64_t max_tokens) {
    double tokens = 0;
    for (const std::int64_t length : lengths) tokens += static_cast<double>(length);
    return tokens / static_cast<double>(max_tokens) / static_cast<double>(bins.size());
  };
  const auto bins = checked(games, 30'000);
  CHECK(efficiency(games, bins, 30'000) >= 0.995);
  CHECK(max_over_mean(bins, games) < 1.03);
  const auto ragged_bins = checked(ragged, 10'000);
  CHECK(efficiency(ragged, ragged_bins, 10'000) >= 0.995);
  CHECK(max_over_mean(ragged_bins, ragged) < 1.03);
}
