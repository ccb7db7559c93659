// Weights of a queue of ids: their sum, and the id that lies at a given mass.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "id_range.h"

namespace archer_fast {

// Ids count up: new ones come at the back, old ones leave at the front. Laid end to end in the order of
// their ids, the weights fill [0, total()), and `find` says whose weight lies at a given place.
//
// A node is one cache line of 8 numbers: of weights at level 0, of the sums of 8 nodes above. Node k of
// level l stands for the ids [k * 8^(l+1), (k+1) * 8^(l+1)) and is kept at k modulo the size of its
// level, a power of two that doubles when the live nodes no longer fit. A dead id weighs 0.
//
//   level 2    ..                  0 .. 511                    ..     The live ids are 60 .. 90. The highest
//   level 1    ..      0 .. 63      |     64 .. 127            ..     level has them in one node or in two
//   level 0    ..56 .. 63 | 64 .. 71 | 72 .. 79 | 80 .. 87 |   ..     neighbours; there `find` begins.
//
// A sum is always the sum of its 8 children, left to right, and never an old sum plus a difference:
// 1. no error grows with the number of updates: it stays below 8 * levels * 2^-53 of the sum;
// 2. every sum is a function of the live ids and their weights alone, whatever was there before. Nor does
//    it matter how large the rings have grown: levels on top pass on what is below, or add the same two
//    numbers. So a tree made anew from the weights finds the same ids.
// All of it is IEEE double arithmetic in a fixed order, so it is the same on every machine.
//
// Owner: the tree owns its numbers. Threads: none of its own rules; the owner locks.
// Memory: 12.6 bytes an id that it has room for, and room for at most twice the ids it ever held.
class SumTree {
 public:
  static constexpr double kMaxWeight = 1e200;  // a weight is 0 to this, so that no sum overflows

  explicit SumTree(std::int64_t first_id);  // Precondition: first_id >= 0.

  IdRange ids() const noexcept { return ids_; }
  std::size_t num_bytes() const noexcept;

  double weight(std::int64_t id) const noexcept;  // O(1). Precondition: the id is live.
  double total() const noexcept;                  // O(log n)
  double min_positive() const noexcept;           // smallest weight above 0, infinity where none is. O(log n)

  // Makes room for `count` more ids. Amortised O(count). Throws std::bad_alloc, and the tree is then as before.
  void reserve(std::int64_t count);

  // O(count + log n). Precondition: reserve(count) went before.
  void push_back(std::int64_t count, double weight) noexcept;
  void pop_front(std::int64_t count) noexcept;

  // Where an id is given twice its last weight holds. O(m log n). Precondition: all ids are live, and
  // there are as many weights.
  void set(std::span<const std::int64_t> ids, std::span<const double> weights) noexcept;

  // The id at each mass, never a dead one nor one of weight 0: a mass that rounding has carried past the
  // end belongs to the last id that has a weight. O(m log n), level by level so that one search does not
  // wait for the memory of another. Uses `masses` up. Precondition: total() > 0, masses are 0 or more, and
  // there are as many ids.
  void find(std::span<double> masses, std::span<std::int64_t> ids) const noexcept;

 private:
  static constexpr int kFanOutBits = 3;
  static constexpr int kFanOut = 1 << kFanOutBits;

  struct alignas(64) Node {
    std::array<double, kFanOut> children;
  };

  struct Level {
    std::vector<Node> sums;  // at level 0: weights
    std::vector<Node> mins;  // smallest weight above 0 of each child; none at level 0, whose weights tell

    std::size_t slot(std::int64_t node) const noexcept { return static_cast<std::size_t>(node) & (sums.size() - 1); }
  };

  // The nodes of the highest level from which all live ids hang: one, or two neighbours.
  struct Top {
    std::size_t level;
    std::int64_t first;
    std::int64_t last;
  };

  static std::vector<Level> make_levels(std::size_t num_leaf_nodes);
  static std::size_t descend(const Node& node, double& mass) noexcept;
  static std::size_t child_of(std::int64_t index) noexcept { return static_cast<std::size_t>(index) & (kFanOut - 1); }

  Top top() const noexcept;
  double sum_of(std::size_t level, std::int64_t node) const noexcept;
  double min_of(std::size_t level, std::int64_t node) const noexcept;
  void refresh(std::size_t level, std::int64_t node) noexcept;  // what its parent says of it
  void refresh_all(IdRange ids) noexcept;
  void fill(IdRange ids, double weight) noexcept;

  IdRange ids_;
  std::vector<Level> levels_;
};

}  // namespace archer_fast
