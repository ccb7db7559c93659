// The priority of every live turn, and draws in proportion to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "id_range.h"
#include "sum_tree.h"
#include "uniform_sampler.h"

namespace archer_fast {

// Proportional prioritised replay (Schaul, Quan, Antonoglou, Silver 2016, arXiv 1511.05952): turn i is
// drawn with probability p_i / sum p. The exponent alpha of the paper is the caller's: p = |error|^alpha.
// A new turn has the largest priority that any turn ever had, so that it is soon seen once.
//
// Owner: holds one number a turn and its sums (sum_tree.h), and no memory at all while every turn has the
// priority it was born with and none was drawn. Threads: none of its own rules; the owner locks.
class TurnPriorities {
 public:
  static constexpr double kFirst = 1.0;  // of the first turns
  static constexpr double kMax = SumTree::kMaxWeight;

  TurnPriorities() = default;

  // Turn ids go on after `first_id`, one for each of `priorities`. O(n).
  // Precondition: kFirst <= max_seen <= kMax, and every priority is 0 to max_seen.
  TurnPriorities(std::int64_t first_id, std::span<const double> priorities, double max_seen);

  double max_seen() const noexcept { return max_seen_; }
  std::size_t num_bytes() const noexcept { return tree_ ? tree_->num_bytes() : 0; }
  std::vector<double> from(std::int64_t first_id) const;  // of the live turns first_id and later. O(n)

  // Makes room for `count` more turns. Throws std::bad_alloc, and nothing has changed then.
  void reserve(std::int64_t count);

  // O(count + log n). Precondition: reserve(count) went before.
  void push_back(std::int64_t count) noexcept;
  void pop_front(std::int64_t count) noexcept;

  // Gives turns new priorities and returns how many of the ids have left since: those are passed over.
  // Where an id is given twice its last priority holds. O(m log n), the first time O(n).
  // Throws std::out_of_range for an id that no turn has had yet and std::invalid_argument for lengths that
  // disagree or a priority that is not 0 to kMax; nothing has changed then.
  std::int64_t update(std::span<const std::int64_t> turn_ids, std::span<const double> priorities);

  // Stratified: the sum of all priorities is cut into as many equal slices as turns are wanted, and each
  // slice has one draw. So a turn of probability P comes n P times, give or take less than 2, ids ascend,
  // and one may come twice. The same ids on every machine (uniform_sampler.h, sum_tree.h).
  //
  // weights: (N P(i))^-beta / max_j (N P(j))^-beta = (p_min / p_i)^beta, at most 1. The maximum is over all
  // live turns that can be drawn, as the paper writes it, not over the batch: a turn's weight does not
  // depend on the company it is drawn in. pow() may differ in its last bit between machines.
  //
  // O(n log N), the first time O(N). Throws std::invalid_argument where beta is not 0 to 1, where there is
  // no turn, or where every priority is 0; nothing is drawn then.
  void draw(UniformSampler& sampler, double beta, std::span<std::int64_t> turn_ids, std::span<float> weights);

 private:
  SumTree& tree();

  IdRange ids_;
  double max_seen_ = kFirst;
  std::optional<SumTree> tree_;  // none while all priorities are max_seen_ and none was drawn
};

}  // namespace archer_fast
