#include "turn_priorities.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "concat.h"

namespace archer_fast {

TurnPriorities::TurnPriorities(std::int64_t first_id, std::span<const double> priorities, double max_seen)
    : ids_{first_id, first_id + std::ssize(priorities)}, max_seen_(max_seen) {
  if (std::all_of(priorities.begin(), priorities.end(), [=](double priority) { return priority == max_seen; })) return;
  std::vector<std::int64_t> ids(priorities.size());
  std::iota(ids.begin(), ids.end(), first_id);
  tree().set(ids, priorities);
}

std::vector<double> TurnPriorities::from(std::int64_t first_id) const {
  assert(ids_.first <= first_id && first_id <= ids_.end);
  std::vector<double> priorities(static_cast<std::size_t>(ids_.end - first_id), max_seen_);
  if (tree_) {
    for (double& priority : priorities) priority = tree_->weight(first_id++);
  }
  return priorities;
}

void TurnPriorities::reserve(std::int64_t count) {
  if (tree_) tree_->reserve(count);
}

void TurnPriorities::push_back(std::int64_t count) noexcept {
  if (tree_) tree_->push_back(count, max_seen_);
  ids_.end += count;
}

void TurnPriorities::pop_front(std::int64_t count) noexcept {
  if (tree_) tree_->pop_front(count);
  ids_.first += count;
}

SumTree& TurnPriorities::tree() {
  if (!tree_) {
    SumTree tree(ids_.first);
    tree.reserve(ids_.size());
    tree.push_back(ids_.size(), max_seen_);
    tree_ = std::move(tree);
  }
  return *tree_;
}

std::int64_t TurnPriorities::update(std::span<const std::int64_t> turn_ids, std::span<const double> priorities) {
  if (priorities.size() != turn_ids.size()) {
    throw std::invalid_argument(
        concat("priorities: wanted one per turn id (", turn_ids.size(), "), got ", priorities.size()));
  }
  std::vector<std::int64_t> live_ids;
  std::vector<double> live_priorities;
  live_ids.reserve(turn_ids.size());
  live_priorities.reserve(turn_ids.size());
  double max_seen = max_seen_;
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    if (turn_ids[i] < 0 || turn_ids[i] >= ids_.end) {
      throw std::out_of_range(concat("turn_ids[", i, "]: wanted an id in [0, ", ids_.end,
                                     "), which a turn has or has had, got ", turn_ids[i]));
    }
    if (!(priorities[i] >= 0.0 && priorities[i] <= kMax)) {
      throw std::invalid_argument(concat("priorities[", i, "]: wanted 0 to ", kMax, ", got ", priorities[i]));
    }
    if (turn_ids[i] < ids_.first) continue;
    live_ids.push_back(turn_ids[i]);
    live_priorities.push_back(priorities[i]);
    max_seen = std::max(max_seen, priorities[i]);
  }
  if (!live_ids.empty()) tree().set(live_ids, live_priorities);
  max_seen_ = max_seen;
  return std::ssize(turn_ids) - std::ssize(live_ids);
}

void TurnPriorities::draw(UniformSampler& sampler, double beta, std::span<std::int64_t> turn_ids,
                          std::span<float> weights) {
  assert(turn_ids.size() == weights.size());
  if (!(beta >= 0.0 && beta <= 1.0)) throw std::invalid_argument(concat("beta: wanted 0 to 1, got ", beta));
  if (turn_ids.empty()) return;
  if (ids_.size() == 0) {
    throw std::invalid_argument(concat("n: wanted 0 draws from an empty buffer, got ", turn_ids.size()));
  }
  std::vector<double> masses(turn_ids.size());
  const SumTree& tree = this->tree();
  const double total = tree.total();
  if (!(total > 0.0)) {
    throw std::invalid_argument(concat("n: wanted 0 draws where every priority is 0, got ", turn_ids.size()));
  }
  sampler.draw_slices(total, masses);
  tree.find(masses, turn_ids);
  const double smallest = tree.min_positive();
  for (std::size_t i = 0; i < turn_ids.size(); ++i) {
    weights[i] = static_cast<float>(std::pow(smallest / tree.weight(turn_ids[i]), beta));
  }
}

}  // namespace archer_fast
