#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <numeric>
#include <vector>

#include "counter_rng.h"
#include "sum_tree.h"

using archer_fast::CounterRng;
using archer_fast::SumTree;
using Ids = std::vector<std::int64_t>;

namespace {

void push(SumTree& tree, std::int64_t count, double weight) {
  tree.reserve(count);
  tree.push_back(count, weight);
}

void set(SumTree& tree, std::int64_t id, double weight) { tree.set(std::vector{id}, std::vector{weight}); }

Ids find(const SumTree& tree, std::vector<double> masses) {
  Ids ids(masses.size());
  tree.find(masses, ids);
  return ids;
}

std::int64_t find(const SumTree& tree, double mass) { return find(tree, std::vector{mass})[0]; }

double random_weight(CounterRng& rng) { return static_cast<double>(rng.next() >> 11U) * 0x1p-53; }

}  // namespace

TEST_CASE("whole-number weights: every answer of a random queue, against a plain one") {
  for (const std::int64_t first_id : {0L, 5L, 63L, 2'097'147L, 4'000'000'000'000L}) {
    CounterRng rng(static_cast<std::uint64_t>(first_id) + 1);
    SumTree tree(first_id);
    std::deque<double> plain;
    std::int64_t first = first_id;
    for (int step = 0; step < 400; ++step) {
      const auto count = static_cast<std::int64_t>(rng.below(step % 50 == 0 ? 300 : 12));
      const auto weight = static_cast<double>(rng.below(4));
      push(tree, count, weight);
      plain.insert(plain.end(), static_cast<std::size_t>(count), weight);
      for (std::uint64_t i = rng.below(10); i > 0 && !plain.empty(); --i) {
        const std::uint64_t place = rng.below(plain.size());
        plain[place] = static_cast<double>(rng.below(5));
        set(tree, first + static_cast<std::int64_t>(place), plain[place]);
      }
      const std::uint64_t gone =
          rng.below(step % 40 == 39 ? plain.size() + 1 : std::min<std::size_t>(plain.size() + 1, 8));
      tree.pop_front(static_cast<std::int64_t>(gone));
      plain.erase(plain.begin(), plain.begin() + static_cast<std::ptrdiff_t>(gone));
      first += static_cast<std::int64_t>(gone);

      REQUIRE(tree.ids().first == first);
      REQUIRE(tree.ids().size() == std::ssize(plain));
      const double total = std::accumulate(plain.begin(), plain.end(), 0.0);
      REQUIRE(tree.total() == total);
      double smallest = std::numeric_limits<double>::infinity();
      std::vector<double> masses;
      Ids wanted;
      for (std::size_t i = 0; i < plain.size(); ++i) {
        const std::int64_t id = first + static_cast<std::int64_t>(i);
        REQUIRE(tree.weight(id) == plain[i]);
        if (plain[i] > 0.0) smallest = std::min(smallest, plain[i]);
        for (double part = 0.0; part < plain[i]; part += 0.5) {
          masses.push_back(static_cast<double>(masses.size()) / 2);
          wanted.push_back(id);
        }
      }
      REQUIRE(tree.min_positive() == smallest);
      if (total > 0.0) REQUIRE(find(tree, masses) == wanted);
    }
  }
}

TEST_CASE("no mass, however rounded, finds a dead id or one without weight") {
  CounterRng rng(7);
  for (const int size : {1, 2, 7, 8, 9, 64, 65, 500, 5000}) {
    SumTree tree(3);
    push(tree, 20, 1e6);
    push(tree, size, 0.0);
    tree.pop_front(20);
    Ids alive;
    for (std::int64_t id = 23; id < 23 + size; ++id) {
      if (rng.below(3) > 0) continue;
      alive.push_back(id);
      set(tree, id, random_weight(rng) * std::pow(10.0, static_cast<double>(rng.below(30)) - 15));
    }
    if (alive.empty()) set(tree, alive.emplace_back(23), 0.1);
    const double total = tree.total();
    std::vector<double> masses{0.0, total, std::nextafter(total, 0.0), total * (1 + 1e-9), 2 * total};
    for (double end = 0.0; const std::int64_t id : alive) {
      end += tree.weight(id);
      for (const double mass : {end, std::nextafter(end, 0.0), std::nextafter(end, 1e300)}) masses.push_back(mass);
    }
    for (const std::int64_t id : find(tree, masses)) {
      REQUIRE(tree.ids().contains(id));
      REQUIRE(tree.weight(id) > 0.0);
    }
    CHECK(find(tree, 0.0) == alive.front());
    CHECK(find(tree, total) == alive.back());
  }
}

TEST_CASE("where the live ids hang from two nodes, one without weight is not entered") {
  constexpr std::int64_t kBoundary = std::int64_t{1} << 30;  // of every level there is
  for (const std::int64_t only : {kBoundary - 3, kBoundary + 3}) {
    SumTree tree(kBoundary - 5);
    push(tree, 10, 0.0);
    set(tree, only, 0.3);
    CHECK(find(tree, std::vector{0.0, 0.29, 0.3, 0.31, 1e300}) == Ids(5, only));
    CHECK(tree.min_positive() == 0.3);
  }
}

TEST_CASE("sums and finds depend on the live weights alone, not on what was there before") {
  CounterRng rng(3);
  SumTree old(100);
  push(old, 3000, 2.0);
  for (int i = 0; i < 5000; ++i) set(old, 100 + static_cast<std::int64_t>(rng.below(3000)), random_weight(rng));
  for (int i = 0; i < 40; ++i) {  // the ring turns many times
    old.pop_front(2500);
    push(old, 2500, random_weight(rng));
    for (int k = 0; k < 300; ++k) {
      set(old, old.ids().first + static_cast<std::int64_t>(rng.below(3000)), random_weight(rng));
    }
  }
  old.pop_front(2900);

  SumTree made_anew(old.ids().first);
  push(made_anew, old.ids().size(), 1.0);
  for (std::int64_t id = old.ids().first; id < old.ids().end; ++id) set(made_anew, id, old.weight(id));
  CHECK(made_anew.num_bytes() < old.num_bytes());
  for (int round = 0; round < 30; ++round) {  // and stay the same as both go on
    REQUIRE(made_anew.total() == old.total());
    REQUIRE(made_anew.min_positive() == old.min_positive());
    std::vector<double> masses(200);
    for (double& mass : masses) mass = random_weight(rng) * old.total();
    REQUIRE(find(made_anew, masses) == find(old, masses));
    for (SumTree* const tree : {&old, &made_anew}) {
      push(*tree, 37, 0.3);
      tree->pop_front(11);
    }
  }
}

TEST_CASE("millions of updates leave no error behind") {
  CounterRng rng(5);
  SumTree tree(0);
  push(tree, 1000, 1.0);
  Ids ids(1000);
  std::vector<double> weights(1000);
  for (int round = 0; round < 3000; ++round) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<std::int64_t>(rng.below(1000));
      weights[i] = random_weight(rng) * (round % 2 == 0 ? 1e12 : 1e-3);
    }
    tree.set(ids, weights);
  }
  for (std::int64_t id = 0; id < 1000; ++id) set(tree, id, 0.1 + static_cast<double>(id % 7));
  long double exact = 0.0L;
  for (std::int64_t id = 0; id < 1000; ++id) exact += tree.weight(id);
  CHECK(std::abs(tree.total() - static_cast<double>(exact)) <= 1e-14 * tree.total());
}

TEST_CASE("an id set twice keeps its last weight, and an empty tree has no mass") {
  SumTree tree(9);
  CHECK(tree.total() == 0.0);
  CHECK(std::isinf(tree.min_positive()));
  push(tree, 2, 1.0);
  tree.set(Ids{10, 10, 9, 10}, std::vector{5.0, 6.0, 0.25, 7.0});
  CHECK(tree.total() == 7.25);
  CHECK(tree.min_positive() == 0.25);
  tree.pop_front(2);
  CHECK(tree.total() == 0.0);
  CHECK(std::isinf(tree.min_positive()));
  push(tree, 1, SumTree::kMaxWeight);
  CHECK(find(tree, SumTree::kMaxWeight) == 11);
}

TEST_CASE("memory is what the header says") {
  SumTree tree(0);
  push(tree, 1 << 20, 1.0);
  CHECK(tree.num_bytes() < 12.7 * (1 << 20));
  CHECK(tree.total() == 1 << 20);
}
